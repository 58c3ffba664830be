#!/usr/bin/env bash
# One would guess: after `hotswap_adapter` put adapter B in the place of A, `save_pretrained` saves B.
# Seen: B's weights beside A's configuration. With another alpha the running model scales as B should, and the saved folder
# scales as A did: loaded, it answers otherwise. Nothing is said.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: peft/utils/hotswap.py, hotswap_adapter
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import GemmaConfig, GemmaForCausalLM

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
row = torch.tensor([[2, 5, 7, 11, 13]])


def base() -> GemmaForCausalLM:
    """The same random Gemma each time."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return GemmaForCausalLM(config).eval()


def answer(model: torch.nn.Module) -> torch.Tensor:
    """Logits of one row."""
    with torch.no_grad():
        return model(row).logits


for seed, (name, alpha) in enumerate((("a", 8), ("b", 32))):
    model = base()
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(name)
wanted = answer(PeftModel.from_pretrained(base(), "b").eval())
running = PeftModel.from_pretrained(base(), "a").eval()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    hotswap_adapter(running, "b", adapter_name="default")
    running.save_pretrained("saved")
about = [str(w.message) for w in said if "alpha" in str(w.message) or "config" in str(w.message)]
again = PeftModel.from_pretrained(base(), "saved").eval()
off = {name: (answer(model) - wanted).abs().max().item() for name, model in (("swapped in", running), ("saved", again))}
print("logits farthest from adapter B's:", off, "| alpha in the saved file:", again.peft_config["default"].lora_alpha)
print("warnings about it:", about)
assert off["swapped in"] < 1e-6 and off["saved"] > 0.01 and again.peft_config["default"].lora_alpha == 8 and not about
PYTHON
