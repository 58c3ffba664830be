#!/usr/bin/env bash
# One would guess: a float64 column read in the "numpy" format is a float64 array.
# Seen: it is float32, as in the "torch" format. A frame's time in seconds since 1970 is then off by up to 64 s, so frames
# of one minute have one time, and frames sorted or split by time get mixed. Without a format, and in "pandas", the column
# is what it was; a single row read in the "numpy" format is float64, too.
# Versions: datasets 5.2.0. Python 3.11.
# Source: datasets/formatting/np_formatter.py, NumpyFormatter._tensorize
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import datasets

print("datasets", datasets.__version__)
start = 1_764_542_909.5  # 2025-11-30 22:48:29.5 UTC
times = [start + seconds for seconds in range(60)]
frames = datasets.Dataset.from_dict({"time": times})
column = frames.with_format("numpy")[:]["time"]
row = frames.with_format("numpy")[0]["time"]
plain, pandas = frames[:]["time"], frames.with_format("pandas")[:]["time"]
print("column:", frames.features["time"].dtype, "read as numpy:", column.dtype, "a row:", row.dtype, "pandas:", pandas.dtype)
print("60 times a second apart, different ones left:", len(set(column.tolist())))
print("farthest off:", max(abs(a - b) for a, b in zip(column.tolist(), times)), "s")
assert (str(column.dtype), str(row.dtype), str(pandas.dtype)) == ("float32", "float64", "float64") and plain == times
assert len(set(column.tolist())) < 3
PYTHON
