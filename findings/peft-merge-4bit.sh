#!/usr/bin/env bash
# One would guess: merging an adapter into a 4-bit layer rounds the sum, so the merged layer is the adapted one with
# a little noise.
# Seen: a step of NF4 is far wider than what LoRA adds. Nearly all weights keep their 4-bit code, and where LoRA
# adds 1 % of the weights' size, the merged layer keeps 1.4 % of that. A warning speaks of rounding errors.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2; torch is the CPU build where pip
# finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft, warning "Merge lora module to 4-bit linear may get different generations
# due to rounding errors"
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")), sep=", ")
warnings.simplefilter("ignore")
torch.manual_seed(0)
width = 512
base = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(width, width, bias=False, quant_type="nf4")).to("cpu")
base.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for


def weights(layer: bitsandbytes.nn.Linear4bit) -> torch.Tensor:
    """What the layer's 4-bit weights stand for."""
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()


plain, codes = weights(base[0]), base[0].weight.data.clone()
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
layer = model.base_model.model[0]
torch.nn.init.normal_(layer.lora_B["default"].weight)
with torch.no_grad():
    layer.lora_B["default"].weight.mul_(0.01 * plain.norm() / layer.get_delta_weight("default").norm())
    delta = layer.get_delta_weight("default")
merged = model.merge_and_unload()[0]
kept = weights(merged) - plain
share = float((kept * delta).sum() / (delta * delta).sum())
same = float((merged.weight.data == codes).float().mean())
print(
    f"LoRA adds {float(delta.norm() / plain.norm()):.1%} of the weights; {same:.1%} of the packed bytes stay the same"
)
print(f"of what LoRA adds the merged layer keeps {share:.1%}")
assert share < 0.1
PYTHON
