#!/usr/bin/env bash
# One would guess: a JSON string stays a string.
# Seen: a column of ISO dates becomes timestamp[s], inside messages too; a chat template then writes another text.
# Versions: datasets 5.2.0. Python 3.11.
# Source: https://arrow.apache.org/docs/python/json.html, automatic type inference
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import datasets

print("datasets", datasets.__version__)
with open("rows.jsonl", "w") as file:
    for day in ("2011-04-05", "2012-10-07"):
        file.write(json.dumps({"messages": [{"role": "assistant", "content": day}]}) + "\n")
rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="cache")
content = rows[0]["messages"][0]["content"]
print("in the file: '2011-04-05'; loaded:", repr(content), "as text:", str(content))
assert not isinstance(content, str) and str(content) == "2011-04-05 00:00:00"
PYTHON
