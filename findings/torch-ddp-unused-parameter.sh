#!/usr/bin/env bash
# One would guess: DistributedDataParallel with a trainable parameter that gets no gradient raises at the first
# step.
# Seen: the first step passes, and gradients in its bucket are not averaged: each process goes on with its own. The
# error comes with the forward pass of step 2.
# Versions: torch 2.13.0, numpy 2.4.6; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html,
# find_unused_parameters
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
cd "$folder"
cat >probe.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.used(x).sum()


dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(Model())
model(torch.full((1, 1), float(rank))).backward()  # gradients 0 and 1, mean 0.5
gradients = [None, None]
dist.all_gather_object(gradients, model.module.used.weight.grad.item())
try:
    model(torch.ones(1, 1)).backward()
    error = "no error"
except RuntimeError as raised:
    error = str(raised).split(".")[0]
if rank == 0:
    print(f"torch {torch.__version__}; step 1: no error, gradients of the two ranks {gradients} (their mean is 0.5)")
    print(f"step 2: {error}")
expected = gradients == [0.0, 1.0] and error.startswith("Expected to have finished reduction")
dist.destroy_process_group()
raise SystemExit(0 if expected else 1)
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --nproc-per-node 2 probe.py
