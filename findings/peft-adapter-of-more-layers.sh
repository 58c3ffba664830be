#!/usr/bin/env bash
# One would guess: an adapter trained on a base with more layers does not load, as a state_dict with unexpected keys
# does not.
# Seen: PeftModel.from_pretrained loads it. The third layer's tensors are dropped without a warning.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft/package_reference/peft_model
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
from importlib.metadata import version

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")


def base(layers: int) -> LlamaForCausalLM:
    """Llama of random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=50
        )
    )


get_peft_model(base(3), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
with safe_open("adapter/adapter_model.safetensors", "pt") as file:
    stored = len(file.keys())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(base(2), "adapter")
loaded = sum("lora_" in name for name, _ in model.named_parameters())
about = [str(w.message) for w in said if "lora" in str(w.message).lower() or "key" in str(w.message).lower()]
print(f"{stored} tensors in the file, {loaded} in the model, warnings about it: {about}")
assert (stored, loaded, about) == (6, 4, [])
PYTHON
