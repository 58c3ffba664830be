#!/usr/bin/env bash
# One would guess: position_ids that begin anew keep two packed texts apart, whether or not an attention mask says
# that no token is padding.
# Seen: positions alone keep them apart; with attention_mask of ones, or with use_cache left at its default, the
# second text sees the first.
# Versions: torch 2.13.0, transformers 5.23.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: transformers/masking_utils.py, find_packed_sequence_indices
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def llama(layers=2, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2, vocab_size=300, **settings)).eval()
import transformers
print("transformers", transformers.__version__)
model, rows = llama(), torch.randint(3, 250, (2, 10), generator=torch.Generator().manual_seed(1))
packed, positions = rows.flatten()[None], torch.arange(10).repeat(2)[None]
with torch.no_grad():
    alone = model(rows[1:]).logits
    def error(**settings):
        return float((model(packed, position_ids=positions, **settings).logits[:, 10:] - alone).abs().max())
    errors = {
        "positions": error(use_cache=False),
        "and a mask of ones": error(use_cache=False, attention_mask=torch.ones_like(packed)),
        "use_cache as it is": error(),
    }
print("largest error of the second text's logits:", errors)
assert errors["positions"] < 1e-5 < 0.01 < min(errors["and a mask of ones"], errors["use_cache as it is"])
PYTHON
