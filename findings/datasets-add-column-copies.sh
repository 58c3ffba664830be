#!/usr/bin/env bash
# One would guess: a column of small numbers added to chosen rows costs its numbers, and the folder of the data stays as it is.
# Seen: add_column first writes a copy of the chosen rows, pictures and all, as cache-*.arrow into the folder that
# load_from_disk read. Added to all rows, which are then chosen, the same column writes nothing.
# Versions: datasets 5.2.0, pillow 13.0.0. Python 3.11.
# Source: datasets/arrow_dataset.py, Dataset.add_column (flatten_indices)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import os
from pathlib import Path

import datasets
from PIL import Image

print("datasets", datasets.__version__)


def png(number):
    buffer = io.BytesIO()
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int64")})
datasets.Dataset.from_list([{"image": png(n), "number": n} for n in range(20)], features=features).save_to_disk("data")
rows, chosen = datasets.load_from_disk("data"), [*range(0, 20, 2)]

first_added = rows.add_column("new", [*range(20)]).select(chosen)
assert not list(Path("data").glob("cache-*"))
then_added = rows.select(chosen).add_column("new", chosen)
(copy,) = Path("data").glob("cache-*")
print("new column, bytes:", 8 * len(chosen), "| written into data/, bytes:", copy.stat().st_size)
assert first_added["new"] == then_added["new"] == chosen and copy.stat().st_size > 100_000
PYTHON
