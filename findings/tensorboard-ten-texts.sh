#!/usr/bin/env bash
# One would guess: add_text at fifty steps gives fifty texts, as add_scalar gives fifty numbers.
# Seen: ten steps are left; which ones is decided by reservoir sampling. The file itself holds all of them.
# Versions: torch 2.13.0, tensorboard 2.21.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://github.com/tensorflow/tensorboard/blob/master/tensorboard/backend/event_processing/event_accumulator.py, DEFAULT_SIZE_GUIDANCE
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 tensorboard==2.21.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

print("tensorboard", tensorboard.__version__)
with SummaryWriter("run") as writer:
    for step in range(50):
        writer.add_text("answers", f"table of step {step}", step)
        writer.add_scalar("loss", step, step)
read = EventAccumulator("run")
read.Reload()
steps = [event.step for event in read.Tensors("answers/text_summary")]
print("texts:", len(steps), steps, "numbers:", len(read.Scalars("loss")))
assert len(steps) == 10 and len(read.Scalars("loss")) == 50
PYTHON
