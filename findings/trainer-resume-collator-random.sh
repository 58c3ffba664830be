#!/usr/bin/env bash
# One would guess: a training resumed in the middle of an epoch restores rng_state.pth, so the collator augments the
# rows that follow as it would have without the stop.
# Seen: the rows that follow are the same, what the collator draws for them is not.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python
# 3.11.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py, _load_rng_state
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import Trainer, TrainingArguments

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")), sep=", ")
drawn = []


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Batch with a random number, as an augmentation draws one."""
    drawn.append((rows[0]["row"], round(torch.rand(()).item(), 6)))
    return {"x": torch.tensor([[float(row["row"])] for row in rows])}


class Model(torch.nn.Linear):
    def forward(self, x):
        return {"loss": super().forward(x).mean()}


def train(resume: str | None) -> list[tuple[int, float]]:
    """(row, random number) of each step that was trained."""
    drawn.clear()
    arguments = TrainingArguments(
        "run",
        per_device_train_batch_size=1,
        num_train_epochs=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=3,
    )
    trainer = Trainer(Model(1, 1), arguments, train_dataset=[{"row": i} for i in range(8)], data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return drawn[-8:] if resume is None else drawn[-4:]


whole, resumed = train(None)[4:], train("run/checkpoint-4")
print("not stopped:", whole)
print("resumed:    ", resumed)
assert [row for row, _ in whole] == [row for row, _ in resumed]
assert all(a != b for (_, a), (_, b) in zip(whole, resumed, strict=True))
PYTHON
