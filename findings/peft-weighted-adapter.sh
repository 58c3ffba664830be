#!/usr/bin/env bash
# One would guess: add_weighted_adapter of two adapters with weights 0.5 and 0.5 and combination_type="linear" adds
# the mean of what they add.
# Seen: A and B matrices are mixed apart, and their product has cross terms (B1 A2, B2 A1): of two random adapters
# the result is as far from the mean as the mean is from zero. combination_type="cat" is exact.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft/developer_guides/model_merging
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
torch.manual_seed(0)
settings = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), settings, adapter_name="day")
model.add_adapter("night", settings)
layer = model.requires_grad_(False).base_model.model[0]
mean = (layer.get_delta_weight("day") + layer.get_delta_weight("night")) / 2
errors = {}
for kind in ("linear", "cat", "svd"):
    model.base_model.add_weighted_adapter(["day", "night"], [0.5, 0.5], kind, combination_type=kind)
    errors[kind] = float((layer.get_delta_weight(kind) - mean).norm() / mean.norm())
print(
    "distance from the mean of both deltas, by combination_type:",
    {kind: f"{error:.1%}" for kind, error in errors.items()},
)
assert errors["linear"] > 0.3
assert errors["cat"] < 1e-5
PYTHON
