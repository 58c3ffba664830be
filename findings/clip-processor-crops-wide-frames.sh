#!/usr/bin/env bash
# One would guess: the image processor of LLaVA-1.5 shrinks or pads a frame, and the model sees all of it.
# Seen: CLIPImageProcessor resizes the shortest side and cuts the middle out. Of a 16:9 frame the left and the right
# 22 % are gone: two frames that differ only there give the same pixel values.
# Versions: torch 2.13.0, transformers 5.23.0, pillow 13.0.0; torch is the CPU build where pip finds one. Python
# 3.11.
# Source: https://huggingface.co/llava-hf/llava-1.5-7b-hf, preprocessor_config.json (do_center_crop)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from PIL import Image
from transformers import CLIPImageProcessor

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "pillow")), sep=", ")
processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
empty = Image.new("RGB", (1920, 1080), "grey")


def with_person(left: int) -> Image.Image:
    """The frame with a white figure, 100 pixels wide, at that place."""
    frame = empty.copy()
    frame.paste("white", (left, 300, left + 100, 800))
    return frame


def seen(frame: Image.Image) -> torch.Tensor:
    """Pixel values for the model."""
    return processor(frame, return_tensors="pt")["pixel_values"]


lost = [left for left in range(0, 1821, 20) if torch.equal(seen(with_person(left)), seen(empty))]
left = [x for x in lost if x < 900]
print(f"a figure is not seen at {len(lost)} of 92 places, among them {left[0]} to {left[-1]} pixels from the left")
assert {0, 300} <= set(lost)
assert 900 not in lost
PYTHON
