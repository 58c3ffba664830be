#!/usr/bin/env bash
# One would guess: ten questions about one picture object store the picture once.
# Seen: its bytes are stored once a row: ten times. A second table of pictures with an index shares them.
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
import io
from importlib.metadata import version

import numpy
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

print(*(f"{name} {version(name)}" for name in ("datasets", "pillow")), sep=", ")
frame = Picture.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8))
file = io.BytesIO()
frame.save(file, "PNG")
features = Features({"image": Image(), "question": Value("string")})
rows = Dataset.from_dict({"image": [frame] * 10, "question": [str(i) for i in range(10)]}, features=features)
print(f"one picture of {len(file.getvalue())} bytes in 10 rows: {rows.data.nbytes} bytes")
assert rows.data.nbytes > 9 * len(file.getvalue())
PYTHON
