#!/usr/bin/env bash
# One would guess: `add_weighted_adapter` of an adapter that trained LLaVA's projector in full (`modules_to_save`) mixes it
# too, or raises.
# Seen: the new adapter gets a copy of the base's projector. Mixed from that one adapter with weight 1, its logits are not the
# adapter's: the LoRA layers are, the projector is untrained. Nothing is said. Two adapters with a projector each are an error.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: peft/tuners/lora/model.py, LoraModel.add_weighted_adapter
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
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
torch.manual_seed(0)
base = LlavaForConditionalGeneration(
    LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=63,
    )
)
config = LoraConfig(
    r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"], init_lora_weights=False
)
model = get_peft_model(base, config, adapter_name="counting").eval()
projector = model.base_model.model.model.multi_modal_projector
with torch.no_grad():
    projector.modules_to_save["counting"].linear_2.weight.mul_(3)  # as if it were trained
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model.add_weighted_adapter(["counting"], [1.0], "mixed", combination_type="linear")
about = [str(w.message) for w in said if "modules_to_save" in str(w.message) or "projector" in str(w.message)]

row = torch.tensor([[1, 63, 63, 63, 63, 2, 3]])
picture = torch.randn(1, 3, 16, 16)
logits = {}
for name in ("counting", "mixed"):
    model.set_adapter(name)
    with torch.no_grad():
        logits[name] = model(input_ids=row, pixel_values=picture).logits
same_lora = all(
    torch.allclose(delta(module, "counting"), delta(module, "mixed"), atol=1e-6)
    for delta in [lambda module, name: module.get_delta_weight(name)]
    for module in model.modules()
    if hasattr(module, "get_delta_weight")
)
weights = {name: module.linear_2.weight for name, module in projector.modules_to_save.items()}
is_base = torch.equal(weights["mixed"], projector.original_module.linear_2.weight)
difference = (logits["counting"] - logits["mixed"]).abs().max().item()
print(f"same LoRA: {same_lora} | mixed projector is the base's: {is_base}, warnings: {about} | logits differ by {difference:.2f}")
assert same_lora and is_base and not about and difference > 0.01

model.add_adapter("gender", config)
try:
    model.add_weighted_adapter(["counting", "gender"], [0.5, 0.5], "both", combination_type="cat")
except ValueError as error:
    print("two with a projector:", error)
else:
    raise SystemExit("two adapters with a projector each are mixed now")
PYTHON
