#!/usr/bin/env bash
# One would guess: `upload_folder(ignore_patterns=["optimizer.pt", ".env", "checkpoint-5"])` leaves out what these lines
# leave out in a .gitignore: files and folders of that name, wherever they are.
# Seen: a pattern is compared with the whole path. In subfolders `optimizer.pt` and `.env` are uploaded, and a folder is
# left out only with a slash behind it, and only at the top. `**/.env` in turn leaves the one at the top in. What works is
# both: `.env` and `*/.env`.
# Versions: huggingface_hub 2.4.0. The filter that upload_folder and snapshot_download call; nothing is sent. Python 3.11.
# Source: huggingface_hub/utils/_paths.py, filter_repo_objects (fnmatch)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile huggingface_hub==2.4.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

print("huggingface_hub", huggingface_hub.__version__)
run = ["model.safetensors", ".env", "tracking/.env", "checkpoint-5/optimizer.pt", "seed-0/checkpoint-5/optimizer.pt"]
uploaded = {}
for patterns in (["optimizer.pt", ".env", "checkpoint-5"], ["checkpoint-5/"], ["**/.env"], [".env", "*/.env"]):
    uploaded[tuple(patterns)] = list(filter_repo_objects(run, ignore_patterns=patterns))
    print("ignoring", patterns, "uploads", uploaded[tuple(patterns)])
assert uploaded["optimizer.pt", ".env", "checkpoint-5"] == [path for path in run if path != ".env"]
assert uploaded["checkpoint-5/",] == [path for path in run if path != "checkpoint-5/optimizer.pt"]
assert ".env" in uploaded["**/.env",] and "tracking/.env" not in uploaded["**/.env",]
assert not any(".env" in path for path in uploaded[".env", "*/.env"])
PYTHON
