#!/usr/bin/env bash
# One would guess: a map that looks at a picture, and returns a number, leaves the picture as it was.
# Seen: who reads row["image"] in map gets a JPEG compressed a second time: other pixels, other bytes. A map that
# does not touch the column keeps the file's bytes.
# Versions: datasets 5.2.0, pillow 13.0.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/image_process
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0 pillow==13.0.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
import io
from importlib.metadata import version

import numpy
from datasets import Dataset, Features, Image
from PIL import Image as Picture

print(*(f"{name} {version(name)}" for name in ("datasets", "pillow")), sep=", ")
random = numpy.random.default_rng(0)
frame = Picture.fromarray(random.integers(0, 255, (64, 64, 3), dtype=numpy.uint8))
file = io.BytesIO()
frame.save(file, "JPEG", quality=95)
dataset = Dataset.from_dict(
    {"image": [{"bytes": file.getvalue(), "path": None}]}, features=Features({"image": Image()})
)


def stored(rows: Dataset) -> bytes:
    """The picture's bytes as they lie in the table."""
    return rows.cast_column("image", Image(decode=False))[0]["image"]["bytes"]


looked = dataset.map(lambda row: {"width": row["image"].width})
untouched = dataset.map(lambda row: {"width": 64})
before, after = (numpy.asarray(rows[0]["image"], dtype=int) for rows in (dataset, looked))
changed = float((before != after).mean())
sizes = len(file.getvalue()), len(stored(untouched)), len(stored(looked))
print(f"bytes of the file, after a map without a look, after one with it: {sizes}; {changed:.0%} of the pixels changed")
assert stored(untouched) == file.getvalue()
assert stored(looked) != file.getvalue()
assert changed > 0.01
PYTHON
