#!/usr/bin/env bash
# One would guess: create_loraplus_optimizer gives LoRA's B matrices loraplus_lr_ratio times the learning rate, and every
# other parameter the rate itself, such as a projector that is trained in full beside them (modules_to_save).
# Seen: every parameter of one dimension gets the ratio, too: the projector's biases learn 16 times as fast as its
# weights.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft/developer_guides/lora, LoRA+ optimized LoRA
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
from peft.optimizers import create_loraplus_optimizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
)
text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
model = get_peft_model(
    LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)),
    LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"]),
)
optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
names = {id(parameter): name for name, parameter in model.named_parameters()}
rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
seen = {
    "A": {rate for name, rate in rates.items() if "lora_A" in name},
    "B": {rate for name, rate in rates.items() if "lora_B" in name},
    "projector's weights": {rate for name, rate in rates.items() if "projector" in name and name.endswith("weight")},
    "projector's biases": {rate for name, rate in rates.items() if "projector" in name and name.endswith("bias")},
}
for what, of in seen.items():
    print(f"learning rate of {what}: {', '.join(map(str, sorted(of)))}")
assert list(seen.values()) == [{1e-4}, {16e-4}, {1e-4}, {16e-4}]
PYTHON
