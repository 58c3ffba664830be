#!/usr/bin/env bash
# One would guess: a picture that metadata.csv does not name is an error, or a row without a value.
# Seen: it is left out without a word.
# Versions: datasets 5.2.0, pillow 13.0.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/image_dataset
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
for i in range(3):
    Image.new("RGB", (8, 8)).save(frames / f"{i}.png")
(frames / "metadata.csv").write_text("file_name,people\n0.png,4\n2.png,7\n")
rows = load_dataset("imagefolder", data_dir=str(frames), cache_dir="cache", split="train")
print(f"3 pictures, 2 of them in metadata.csv: {rows.num_rows} rows, people {rows['people'][:]}")
assert list(rows["people"]) == [4, 7]
PYTHON
