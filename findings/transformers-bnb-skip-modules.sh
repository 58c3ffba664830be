#!/usr/bin/env bash
# One would guess: llm_int8_skip_modules=["vision_tower"] keeps the vision tower out of 4 bits, besides lm_head,
# which is never quantized.
# Seen: the list replaces the one that transformers finds by itself. Whoever names the tower alone gets lm_head in 4
# bits, with no word about it.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, bitsandbytes 0.50.2; torch is the CPU build where
# pip finds one. Python 3.11.
# Source: https://github.com/huggingface/transformers/blob/main/src/transformers/quantizers/base.py,
# get_modules_to_not_convert
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "bitsandbytes")), sep=", ")
vision = CLIPVisionConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
)
text = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
LlavaForConditionalGeneration(
    LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
).save_pretrained("base")


def head_is_quantized(skip: list[str] | None) -> bool:
    """Whether lm_head is in 4 bits where those modules are named."""
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = LlavaForConditionalGeneration.from_pretrained("base", quantization_config=config, device_map="cpu")
    return isinstance(model.lm_head, Linear4bit)


seen = {str(skip): head_is_quantized(skip) for skip in (None, ["vision_tower"], ["vision_tower", "lm_head"])}
print("lm_head in 4 bits by llm_int8_skip_modules:", seen)
assert list(seen.values()) == [False, True, False]
PYTHON
