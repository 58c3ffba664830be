#!/usr/bin/env bash
# One would guess: eval_loss is the mean over the evaluation set's supervised tokens, so it does not depend on the
# evaluation batch size.
# Seen: each batch's mean counts for its number of rows, not of tokens. Rows with longer answers weigh less or more
# as the batches fall, and eval_loss of one model on one set changes with per_device_eval_batch_size.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python
# 3.11.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py, evaluation_loop
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        initializer_range=1.0,
    )
)


def row(answer: int) -> dict[str, list[int]]:
    """Prompt of two tokens and an answer of that many."""
    ids = torch.randint(1, 50, (2 + answer,)).tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, -100, *ids[2:]]}


class Pad:
    """The little of a tokenizer that the collator needs."""

    padding_side, pad_token_id = "right", 0

    def pad(self, rows, **settings):
        longest = max(len(r["input_ids"]) for r in rows)
        padded = {
            k: [r[k] + [v] * (longest - len(r["input_ids"])) for r in rows]
            for k, v in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
        }
        return {k: torch.tensor(v) for k, v in padded.items()}


rows = [row(1 + 15 * (i % 2)) for i in range(16)]
losses = {}
for size in (1, 4, 16):
    arguments = TrainingArguments(
        "run", per_device_eval_batch_size=size, report_to="none", use_cpu=True, disable_tqdm=True
    )
    losses[size] = Trainer(model, arguments, data_collator=lambda r: Pad().pad(r), eval_dataset=rows).evaluate()[
        "eval_loss"
    ]
print("eval_loss by evaluation batch size:", {size: round(loss, 4) for size, loss in losses.items()})
assert abs(losses[1] - losses[16]) > 0.01
PYTHON
