#!/usr/bin/env bash
# One would guess: both, or neither, hold the pictures of an Image column made from paths.
# Seen: the Parquet file holds paths on this machine: once the files are gone, reading it is a FileNotFoundError.
# Versions: datasets 5.2.0, pillow 13.0.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/package_reference/main_classes, Dataset.to_parquet
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os
import datasets
from PIL import Image

print("datasets", datasets.__version__)
datasets.disable_progress_bars()
Image.new("RGB", (8, 8)).save("a.png")
rows = datasets.Dataset.from_dict({"image": [os.path.abspath("a.png")]}).cast_column("image", datasets.Image())
rows.save_to_disk("saved")
rows.to_parquet("rows.parquet")
os.remove("a.png")
print("save_to_disk:", datasets.load_from_disk("saved")[0]["image"].size)
parquet = datasets.load_dataset("parquet", data_files="rows.parquet", split="train", cache_dir="cache")
try:
    parquet[0]
    said = None
except FileNotFoundError as error:
    said = str(error)
print("to_parquet:", said)
assert said is not None
PYTHON
