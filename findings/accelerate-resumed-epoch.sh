#!/usr/bin/env bash
# One would guess: a training saved by save_state in the middle of its second epoch and resumed as the checkpointing guide
# says (load_state, skip_first_batches, then the whole loader) gets the rows that the second epoch had left, in their order.
# use_seedable_sampler is there for just that: its sampler is a part of what save_state writes.
# Seen: the loader counts its own epochs from 0 and sets the sampler's by them, over what was read. The resumed epoch has
# the first epoch's order: rows of the second are seen twice, others not at all, and the third repeats the first. A call
# of set_epoch on the loader in every epoch, before the stop and after it, gives the uninterrupted order.
# Versions: torch 2.13.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/accelerate/usage_guides/checkpoint; accelerate/data_loader.py, DataLoaderShard.__iter__
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0
cd "$folder"
cat > train.py <<'PYTHON'
import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

what, calls_set_epoch = sys.argv[1], sys.argv[2] == "set_epoch"
set_seed(0)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
loader, model = accelerator.prepare(DataLoader(range(12), batch_size=2, shuffle=True), torch.nn.Linear(1, 1))
if what == "resume":
    accelerator.load_state("checkpoint")
epochs = []
for epoch in range(1 if what == "resume" else 0, 3):
    if calls_set_epoch:
        loader.set_epoch(epoch)
    resumed = what == "resume" and epoch == 1
    epochs.append([])
    for step, batch in enumerate(accelerator.skip_first_batches(loader, 3) if resumed else loader):
        epochs[-1] += batch.tolist()
        if what == "start" and (epoch, step) == (1, 2):
            accelerator.save_state("checkpoint")
print(json.dumps(epochs))
PYTHON
"$folder/venv/bin/python" - <<'PYTHON'
import json
import subprocess
import sys
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "accelerate")), sep=", ")
epochs = {}
for how in ("no set_epoch", "set_epoch"):
    for what in ("start", "resume"):
        process = subprocess.run([sys.executable, "train.py", what, how], stdout=subprocess.PIPE, check=True, text=True)
        epochs[how, what] = json.loads(process.stdout)
    first, second, third = epochs[how, "start"]
    print(f"{how}: uninterrupted, rows of epochs 1, 2 and 3: {first} {second} {third}")
    print(f"{how}: resumed after three batches of epoch 2: {epochs[how, 'resume']}")

first, second, third = epochs["no set_epoch", "start"]
assert [first, second, third] == epochs["set_epoch", "start"] and first != second
rest, after = epochs["no set_epoch", "resume"]
assert rest == first[6:] and after == first
print(f"of epoch 2 seen twice: {sorted({*second[:6]} & {*rest})}, never: {sorted({*range(12)} - {*second[:6], *rest})}")
assert {*second[:6]} & {*rest}
assert epochs["set_epoch", "resume"] == [second[6:], third]
PYTHON
