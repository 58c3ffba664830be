#!/usr/bin/env bash
# One would guess: an unknown key of the configuration is an error, as it is inside the sections.
# Seen: 'zero_optimizaton: {stage: 3}' trains with stage 0, and no word is said.
# Versions: torch 2.13.0, deepspeed 0.19.8; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://www.deepspeed.ai/docs/config-json
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 deepspeed==0.19.8
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig

print("deepspeed", deepspeed.__version__)
try:
    DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stagee": 3}})
    inside = False
except ValueError as error:
    inside = True
    print("inside:", str(error).splitlines()[0])
config = DeepSpeedConfig({"train_batch_size": 1, "zero_optimizaton": {"stage": 3}})
print("outside: stage", config.zero_optimization_stage)
assert inside and config.zero_optimization_stage == 0
PYTHON
