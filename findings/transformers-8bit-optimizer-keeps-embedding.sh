#!/usr/bin/env bash
# One would guess: a Trainer that is deleted with its model leaves nothing of the model in memory.
# Seen: with `optim="adamw_8bit"` the Trainer registers each embedding with bitsandbytes' global manager, so that its
# state stays in 32 bits. The manager keeps it: the weight outlives model and Trainer (0.5 GB of a 7B model, 1 GB of
# Gemma-2b, for each training of a process).
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, bitsandbytes 0.50.2; torch is the CPU build where pip
# finds one. Python 3.11.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py, create_optimizer
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "bitsandbytes")), sep=", ")
import gc
import weakref

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ids = torch.arange(8)
alive = {}
for optim in ("adamw_torch", "adamw_8bit"):
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
    )
    arguments = TrainingArguments(
        "run", optim=optim, max_steps=1, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
    trainer.train()
    embedding = weakref.ref(model.model.embed_tokens.weight)
    layer = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model, trainer
    gc.collect()
    alive[optim] = {"embedding": embedding() is not None, "another weight": layer() is not None}
    print(optim, "still in memory:", alive[optim])
assert not any(alive["adamw_torch"].values())
assert alive["adamw_8bit"] == {"embedding": True, "another weight": False}
PYTHON
