#!/usr/bin/env bash
# One would guess: accelerate launch of one process ends with the script's exit status, which tells a batch system
# "come again" (75) from "broken" (1).
# Seen: every status but 0 becomes 1.
# Versions: torch 2.13.0, accelerate 1.15.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/launch.py, simple_launcher
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 accelerate==1.15.0
cd "$folder"
echo 'raise SystemExit(75)' >stops.py
"$folder/venv/bin/pip" freeze | grep -E '^(torch|accelerate)=='
status=0
"$folder/venv/bin/accelerate" launch --cpu --num_processes 1 stops.py 2>/dev/null || status=$?
echo "the script ends with 75, accelerate launch with $status"
[ "$status" -eq 1 ]
