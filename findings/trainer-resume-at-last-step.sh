#!/usr/bin/env bash
# One would guess: Trainer, resumed from the checkpoint of its last step, has nothing left to train, and ends as it ended.
# Seen: it trains one more step, of max_steps + 1, where the last step is not the end of an epoch. With a constant rate the
# weights are others; with one that has decayed to 0 only the count and the loss are. A run that was killed between its last
# checkpoint and its end meets this.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: transformers/trainer.py, Trainer._run_epoch
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print("torch", torch.__version__, "transformers", transformers.__version__)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))


rows = [{"input_ids": [1, 2, 3, number], "labels": [1, 2, 3, number]} for number in range(40)]
settings = dict(output_dir="run", max_steps=3, save_steps=3, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True)
trained, resumed = llama(), llama()
ended = Trainer(model=trained, args=TrainingArguments(**settings), train_dataset=rows).train()
again = Trainer(model=resumed, args=TrainingArguments(**settings), train_dataset=rows).train(resume_from_checkpoint="run/checkpoint-3")

same = torch.equal(trained.lm_head.weight, resumed.lm_head.weight)
print("max_steps 3, steps at the end:", ended.global_step, "and, resumed:", again.global_step, "| same weights:", same)
assert (ended.global_step, again.global_step, same) == (3, 4, False)
PYTHON
