#!/usr/bin/env bash
# One would guess: a folder of frames loads as one split, "train", with all of its frames.
# Seen: a word such as test in a file's name makes the split. Frames of a camera called test-gate load as "test",
# and all others are left out without a word.
# Versions: datasets 5.2.0, pillow 13.0.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/repository_structure
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("datasets", "pillow")), sep=", ")
frames = Path("frames")
frames.mkdir()
names = ["hall-001.png", "hall-002.png", "test-gate-001.png", "yard-001.png"]
for name in names:
    Image.new("RGB", (8, 8)).save(frames / name)
loaded = load_dataset("imagefolder", data_dir=str(frames), cache_dir="cache")
seen = {split: rows.num_rows for split, rows in loaded.items()}
print(f"{len(names)} frames in the folder; loaded: {seen}")
assert seen == {"test": 1}
PYTHON
