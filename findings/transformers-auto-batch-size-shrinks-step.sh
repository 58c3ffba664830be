#!/usr/bin/env bash
# One would guess: `auto_find_batch_size` keeps the rows of a step: a smaller batch accumulates more often.
# Seen: the batch is made a tenth smaller until it fits and `gradient_accumulation_steps` stays: steps of 16 rows
# become steps of 4, the learning rate is the one for 16, and no line says so.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python
# 3.11.
# Source: https://github.com/huggingface/accelerate/blob/main/src/accelerate/utils/memory.py, find_executable_batch_size
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

MOST = 2  # rows that "fit"
ids = torch.arange(8)
tried, trained = [], []


class SmallGpu(Trainer):
    """Says of batches of more rows what PyTorch says of a full GPU."""

    def training_step(self, model, inputs, *args, **kwargs):
        rows = len(inputs["input_ids"])
        if rows > MOST:
            tried.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        trained.append(rows)
        return super().training_step(model, inputs, *args, **kwargs)


model = LlamaForCausalLM(
    LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
)
arguments = TrainingArguments(
    "run", auto_find_batch_size=True, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=3,
    save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
)  # fmt: skip
trainer = SmallGpu(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 64)
trainer.train()
print("batches that did not fit:", tried)
print("batches of three steps:", trained, "where a step of the arguments has 2 x 8 rows")
assert trained == [2] * 6 and trainer.args.gradient_accumulation_steps == 2
PYTHON
