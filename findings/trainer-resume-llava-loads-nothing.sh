#!/usr/bin/env bash
# One would guess: Trainer resumes a LLaVA that is trained in full from its checkpoint's weights, as from_pretrained would.
# Seen: the file's names are those of the published model, which from_pretrained renames; Trainer loads the file as it is,
# not strictly. Not one tensor fits: it warns, and training goes on from the weights that the model was made with.
# load_best_model_at_end reads the same way.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: transformers/trainer.py, Trainer._load_from_checkpoint
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

print("torch", torch.__version__, "transformers", transformers.__version__)


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))


rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
settings = dict(output_dir="run", max_steps=2, save_steps=2, learning_rate=0.1, report_to=[], disable_tqdm=True, use_cpu=True)
trained = llava()
Trainer(model=trained, args=TrainingArguments(**settings), train_dataset=rows).train()
resumed = llava()
Trainer(model=resumed, args=TrainingArguments(**settings), train_dataset=rows).train(resume_from_checkpoint="run/checkpoint-2")
read = LlavaForConditionalGeneration.from_pretrained("run/checkpoint-2")

head = [model.lm_head.weight for model in (llava(), trained, resumed, read)]
print("resumed as it was made:", torch.equal(head[2], head[0]), "| as trained:", torch.equal(head[2], head[1]))
print("from_pretrained as trained:", torch.equal(head[3], head[1]))
assert torch.equal(head[2], head[0]) and not torch.equal(head[2], head[1]) and torch.equal(head[3], head[1])
PYTHON
