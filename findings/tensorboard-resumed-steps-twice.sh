#!/usr/bin/env bash
# One would guess: a run that stopped at step 6 and went on from its checkpoint at step 4, in the same folder, has
# one value for each step.
# Seen: steps 5 and 6 are there twice, the lost values before those that count. SummaryWriter takes back the steps
# after a resume only with purge_step.
# Versions: torch 2.13.0, tensorboard 2.21.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://docs.pytorch.org/docs/stable/tensorboard.html, purge_step
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 tensorboard==2.21.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import time
from importlib.metadata import version

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

print(*(f"{name} {version(name)}" for name in ("torch", "tensorboard")), sep=", ")
logging.disable(logging.WARNING)


def steps(folder: str, **settings) -> list[int]:
    """Steps that are read where a run logs 1 to 6, and another, from 4 on, 5 to 8."""
    for first, last, extra in ((1, 6, {}), (5, 8, settings)):
        with SummaryWriter(folder, **extra) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("loss", 1.0, step)
        time.sleep(1.1)  # files are named by the second
    return [event.step for event in EventAccumulator(folder).Reload().Scalars("loss")]


plain, purged = steps("plain"), steps("purged", purge_step=5)
print("steps read:", plain, "with purge_step:", purged)
assert plain == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
assert purged == [1, 2, 3, 4, 5, 6, 7, 8]
PYTHON
