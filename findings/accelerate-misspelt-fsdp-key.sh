#!/usr/bin/env bash
# One would guess: an unknown key of an accelerate configuration is an error, as one at its top level is.
# Seen: `fsdp_versoin: 2` inside of `fsdp_config` is dropped without a word, and the launched program gets FSDP 1. The
# same word one level up is an error that names it.
# Versions: torch 2.13.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/config/config_args.py
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0
cd "$folder"
cat > program.py <<'PYTHON'
import os

print("FSDP_VERSION", os.environ["FSDP_VERSION"])
PYTHON
cat > launch.yaml <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 1
use_cpu: true
fsdp_config:
  fsdp_versoin: 2
YAML
cp launch.yaml top.yaml
echo "fsdp_versoin: 2" >> top.yaml
"$folder/venv/bin/pip" list 2>/dev/null | grep -E "^(torch|accelerate) "
"$folder/venv/bin/accelerate" launch --config_file launch.yaml program.py 2> inside.txt | tee version.txt
"$folder/venv/bin/accelerate" launch --config_file top.yaml program.py > /dev/null 2> top.txt || echo "top level: refused"
grep -q "FSDP_VERSION 1" version.txt
if grep -q "versoin" inside.txt; then exit 1; fi
grep -q "versoin" top.txt
