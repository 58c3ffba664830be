#!/usr/bin/env bash
# One would guess: accelerate launch --cpu --num_processes 2 starts two processes on the CPU.
# Seen: it starts one, and does not say so. torchrun --nproc-per-node 2 starts two, which accelerate's state
# recognizes.
# Versions: torch 2.13.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/accelerate/package_reference/cli
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0
cd "$folder"
cat >probe.py <<'PYTHON'
from importlib.metadata import version

from accelerate import PartialState

state = PartialState(cpu=True)
if state.is_main_process:
    print(f"torch {version('torch')}, accelerate {version('accelerate')}, processes: {state.num_processes}")
PYTHON
export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
launched=$("$folder/venv/bin/accelerate" launch --cpu --num_processes 2 probe.py 2>/dev/null)
torchrun=$("$folder/venv/bin/torchrun" --nproc-per-node 2 probe.py 2>/dev/null)
printf 'accelerate launch: %s\ntorchrun: %s\n' "$launched" "$torchrun"
[[ $launched == *'processes: 1' && $torchrun == *'processes: 2' ]]
