#!/usr/bin/env bash
# One would guess: tokenizer.json and tokenizer_config.json are read by both versions, as safetensors files are.
# Seen: 5.23 names a class that 4.57 does not have (TokenizersBackend), and AutoTokenizer there refuses the folder.
# Versions: transformers 5.23.0 writes, 4.57.6 reads. Python 3.11.
# Source: https://github.com/huggingface/transformers/blob/main/MIGRATION_GUIDE_V5.md
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile transformers==5.23.0
"$folder/venv/bin/pip" install --quiet --no-compile --target "$folder/older" transformers==4.57.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print("saved by transformers", transformers.__version__)
tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "people": 1}, unk_token="<unk>"))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained("tokenizer")
PYTHON
PYTHONPATH="$folder/older" "$folder/venv/bin/python" - <<'PYTHON'
import transformers
from transformers import AutoTokenizer

said = None
try:
    AutoTokenizer.from_pretrained("tokenizer")
except ValueError as error:
    said = str(error)
print("read by transformers", transformers.__version__, "->", said)
assert said is not None and "TokenizersBackend" in said
PYTHON
