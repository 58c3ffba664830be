#!/usr/bin/env bash
# One would guess: the parts of a message are one text, spaces and all.
# Seen: "There are " and "23 people." become "There are23 people."
# Versions: torch 2.13.0, transformers 5.23.0, trl 1.16.0, datasets 5.2.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: trl/chat_templates/gemma3_training.jinja
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path
import trl
from transformers.utils.chat_template_utils import render_jinja_template

print("trl", trl.__version__)
template = (Path(trl.__file__).parent / "chat_templates" / "gemma3_training.jinja").read_text()
parts = [{"type": "text", "text": text} for text in ("There are ", "23 people.")]
messages = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}, {"role": "assistant", "content": parts}]
rendered, _ = render_jinja_template([messages], chat_template=template, bos_token="<bos>")
print(repr(rendered[0]))
assert "There are23 people." in rendered[0]
PYTHON
