#!/usr/bin/env bash
# One would guess: modules_to_save=["image_newline"] trains and saves LLaVA-NeXT's newline embedding, or says that
# there is no such module.
# Seen: image_newline is a bare Parameter, not a module. The name is ignored without a word while another name of
# the list is found: the embedding stays frozen and is not in the adapter's file.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft/package_reference/lora, modules_to_save
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=99, image_grid_pinpoints=[[32, 64]])
model = LlavaNextForConditionalGeneration(config)
wanted = ["image_newline", "multi_modal_projector"]
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=wanted))
trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
saved = list(get_peft_model_state_dict(model))
for name in wanted:
    print(f"{name}: {sum(name in n for n in trainable)} trainable tensors, {sum(name in n for n in saved)} saved")
assert not any("image_newline" in name for name in trainable + saved)
assert any("multi_modal_projector" in name for name in saved)
PYTHON
