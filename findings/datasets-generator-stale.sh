#!/usr/bin/env bash
# One would guess: `Dataset.from_generator` of a function that reads a file notices that the file has changed, as
# `load_dataset` of that file does.
# Seen: the cache knows the function and its arguments, which are the same. After the labels are corrected, the old ones
# come back from the cache, without a word, in this process and in later ones.
# Versions: datasets 5.2.0. Python 3.11.
# Source: datasets/io/generator.py and packaged_modules/generator/generator.py
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0
cd "$folder"
cat > read.py <<'PYTHON'
import csv
import sys

import datasets

datasets.disable_progress_bars()


def rows(path: str):
    """A row for each line of a table."""
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield {"count": int(row["count"])}


by_generator = datasets.Dataset.from_generator(rows, gen_kwargs={"path": "labels.csv"}, cache_dir="cache")
by_loader = datasets.load_dataset("csv", data_files="labels.csv", split="train", cache_dir="cache")
print("datasets", datasets.__version__, "from_generator:", by_generator["count"][:], "load_dataset:", by_loader["count"][:])
assert (by_generator["count"][:], by_loader["count"][:]) == ([2, 3], list(map(int, sys.argv[1:])))
PYTHON
printf 'frame,count\n1,2\n2,3\n' > labels.csv
"$folder/venv/bin/python" read.py 2 3
sleep 1
echo "labels.csv corrected to 5, 6, 7"
printf 'frame,count\n1,5\n2,6\n3,7\n' > labels.csv
"$folder/venv/bin/python" read.py 5 6 7
