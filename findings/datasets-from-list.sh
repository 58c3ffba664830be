#!/usr/bin/env bash
# One would guess: Dataset.from_list keeps every key that a row has.
# Seen: the first row's keys are the columns. A key that comes later is dropped with all of its values.
# Versions: datasets 5.2.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/package_reference/main_classes, Dataset.from_list
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from datasets import Dataset

print(*(f"{name} {version(name)}" for name in ("datasets",)), sep=", ")
rows = [{"question": "How many?"}, {"question": "How many?", "people": 4}]
print(f"{rows} has the columns {Dataset.from_list(rows).column_names}")
assert Dataset.from_list(rows).column_names == ["question"]
PYTHON
