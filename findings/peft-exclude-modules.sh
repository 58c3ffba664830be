#!/usr/bin/env bash
# One would guess: exclude_modules=["vision_tower"] keeps LoRA out of the vision tower, as target_modules=["q_proj"]
# finds every q_proj.
# Seen: the list is compared with the end of each module's name, so it excludes vision_tower itself and nothing
# inside: the tower is adapted as without it. A regular expression for the whole name (".*vision_tower.*") excludes.
# Versions: torch 2.13.0, transformers 5.23.0, peft 0.21.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://huggingface.co/docs/peft/package_reference/lora, exclude_modules
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")), sep=", ")
vision = CLIPVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
)
text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)


def adapted(**settings) -> tuple[int, int]:
    """Modules with LoRA in the vision tower and outside it."""
    model = get_peft_model(
        LlavaForConditionalGeneration(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)
    )
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    tower = sum("vision_tower" in name for name in names)
    return tower, len(names) - tower


seen = {
    str(s): adapted(**s) for s in ({}, {"exclude_modules": ["vision_tower"]}, {"exclude_modules": ".*vision_tower.*"})
}
for settings, (tower, rest) in seen.items():
    print(f"{settings}: {tower} adapted in the tower, {rest} outside")
assert list(seen.values()) == [(4, 4), (4, 4), (0, 4)]
PYTHON
