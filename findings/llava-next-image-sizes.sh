#!/usr/bin/env bash
# One would guess: LLaVA-NeXT checks image_sizes picture by picture, so sizes in the wrong order are an error.
# Seen: the batch's total of image tokens is compared. Sizes of two rows swapped have the same total: no error, the
# features of one picture are laid out for the other's shape and run over into its row, and the logits are others.
# Versions: torch 2.13.0, transformers 5.23.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/transformers/model_doc/llava_next
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
torch.manual_seed(0)
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
text = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=100,
    initializer_range=0.3,
)
config = LlavaNextConfig(
    vision_config=vision, text_config=text, image_token_index=99, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
)
model = LlavaNextForConditionalGeneration(config).eval()
# One tile of 4x4 patches for the whole picture; two tiles side by side or one above the other, a newline for each
# row of patches.
tokens = {(32, 64): 16 + 4 * (8 + 1), (64, 32): 16 + 8 * (4 + 1)}
longest = max(tokens.values())
sizes = torch.tensor(list(tokens))
rows = [[1] * (longest - count) + [99] * count + [5, 6, 7] for count in tokens.values()]
pixels = torch.randn(2, 3, 3, 32, 32)
with torch.no_grad():
    right = model(input_ids=torch.tensor(rows), pixel_values=pixels, image_sizes=sizes).logits[:, -1]
    swapped = model(input_ids=torch.tensor(rows), pixel_values=pixels, image_sizes=sizes.flip(0)).logits[:, -1]
change = ((right - swapped).norm(dim=-1) / right.norm(dim=-1)).tolist()
shares = " and ".join(f"{share:.0%}" for share in change)
print(f"image tokens by row: {list(tokens.values())}; no error; the last token's logits change by {shares}")
assert min(change) > 0.01
PYTHON
