#!/usr/bin/env bash
# One would guess: packing with "bfd" cuts rows at max_length, as documented, and drops or names those that have
# nothing left to learn from.
# Seen: a row whose prompt alone fills max_length stays in the data, at full length, with no supervised token, and
# nothing is said.
# Versions: torch 2.13.0, transformers 5.23.0, trl 1.16.0, datasets 5.2.0; torch is the CPU build where pip finds
# one. Python 3.11.
# Source: https://huggingface.co/docs/trl/sft_trainer, packing
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile \
  torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from datasets import Dataset
from trl import pack_dataset

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "datasets")), sep=", ")
rows = Dataset.from_dict(
    {"input_ids": [[1] * 12 + [2] * 4, [1] * 3 + [2] * 2], "labels": [[-100] * 12 + [2] * 4, [-100] * 3 + [2] * 2]}
)
packed = pack_dataset(rows, seq_length=8, strategy="bfd")
tokens = [len(ids) for ids in packed["input_ids"]]
supervised = [sum(label != -100 for label in labels) for labels in packed["labels"]]
print(f"2 rows of 16 and 5 tokens, 4 and 2 of them answers, packed to 8: tokens {tokens}, supervised {supervised}")
assert sorted(zip(tokens, supervised, strict=True)) == [(5, 2), (8, 0)]
PYTHON
