#!/usr/bin/env bash
# One would guess: a tokenizer that cannot be saved (full disk, missing folder) raises OSError, with its number and the file's
# name, as Python's own open() does; a program that catches OSError can say what to do.
# Seen: a bare Exception without a number and without a name; `except OSError` lets it pass.
# Versions: tokenizers 0.23.3. Python 3.11.
# Source: https://github.com/huggingface/tokenizers/blob/main/bindings/python/src/error.rs
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/pip" freeze | grep -E '^tokenizers=='
"$folder/venv/bin/python" - <<'EOF'
from tokenizers import Tokenizer
from tokenizers.models import BPE

path = "no folder/tokenizer.json"
try:
    open(path, "w")
except OSError as error:
    print(f"open: {type(error).__name__}, errno {error.errno}, {error.filename!r}")
try:
    Tokenizer(BPE()).save(path)
except Exception as error:
    print(f"save: {type(error).__name__}: {error}")
    assert type(error) is Exception and not hasattr(error, "errno") and path not in str(error)
EOF
