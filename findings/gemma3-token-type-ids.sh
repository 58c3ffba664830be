#!/usr/bin/env bash
# One would guess: Gemma 3 sees from pixel_values and image tokens where a picture lies, and lets its tokens see
# each other.
# Seen: that comes from token_type_ids alone. A training step without them raises nothing: the picture's tokens are
# then read from left to right, and the same batch has another loss.
# Versions: torch 2.13.0, transformers 5.23.0; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/transformers/model_doc/gemma3
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

print(*(f"{name} {version(name)}" for name in ("torch", "transformers")), sep=", ")
torch.manual_seed(0)
text = Gemma3TextConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.3,
    pad_token_id=0,
)
vision = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
config = Gemma3Config(
    text_config=text,
    vision_config=vision,
    mm_tokens_per_image=16,
    image_token_index=99,
    boi_token_index=97,
    eoi_token_index=98,
)
model = Gemma3ForConditionalGeneration(config).train()
torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero before training
image = torch.full((16,), 99)
ids = torch.cat([torch.tensor([2, 97]), image, torch.tensor([98, 5, 6, 7, 8])])[None]
batch = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "pixel_values": torch.randn(1, 3, 32, 32),
    "labels": torch.where(ids < 97, ids, -100),
}
with torch.no_grad():
    whole = model(**batch, token_type_ids=(ids == 99).long()).loss.item()
    causal = model(**batch, token_type_ids=torch.zeros_like(ids)).loss.item()
    try:
        without = model(**batch).loss.item()
    except ValueError as error:
        raise SystemExit(f"token_type_ids are asked for now: {error}") from error
print(f"loss with token_type_ids {whole:.5f}, with all of them zero {causal:.5f}, without {without:.5f}")
assert abs(without - causal) < 1e-6
assert abs(without - whole) > 1e-3
PYTHON
