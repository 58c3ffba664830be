#!/usr/bin/env bash
# One would guess: resume="must" is an error where the run is unknown, offline too, and a second run of the same id
# in the same folder goes on at the step where the first ended.
# Seen: offline any id is accepted, run.resumed is False, and the step starts at 0 again; a line on the console says
# so, and no error does.
# Versions: wandb 0.31.0. Python 3.11.
# Source: https://docs.wandb.ai/models/runs/resuming
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile wandb==0.31.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import version

import wandb

print(*(f"{name} {version(name)}" for name in ("wandb",)), sep=", ")
os.environ["WANDB_SILENT"] = "true"


def start(run_id: str) -> tuple[bool, int, int]:
    """Whether the run says that it is resumed, its step at the start and after three logs."""
    run = wandb.init(project="counting", id=run_id, resume="must", mode="offline")
    seen = run.resumed, run.step
    for _ in range(3):
        run.log({"loss": 1.0})
    step = run.step
    run.finish()
    return *seen, step


unknown, again = start("unknown"), start("unknown")
print(f"unknown run (resumed, first step, step after three logs): {unknown}; the same id again: {again}")
assert unknown == again == (False, 0, 3)
PYTHON
