#!/usr/bin/env bash
# One would guess: the box of a whole picture is the box of the whole picture in a mirrored one, and kornia and albumentations
# move boxes alike.
# Seen: kornia takes the corners of "bbox_xyxy" for centres of pixels. A mirrored box lies one pixel too far left, that of the
# whole picture begins at -1; in a picture of half the size it ends half a pixel early. albumentations gives the exact
# boxes. For a head of eight pixels the IoU of the two is 0.78.
# Versions: torch 2.13.0, kornia 0.9.0, albumentationsx 2.5.1, numpy 2.4.6; torch is the CPU build where pip finds one.
# Python 3.11.
# Source: https://kornia.readthedocs.io/en/latest/augmentation.container.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 kornia==0.9.0 \
  "albumentationsx[headless]==2.5.1" numpy==2.4.6
cd "$folder"
NO_ALBUMENTATIONS_UPDATE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import albumentations
import kornia.augmentation
import numpy as np
import torch

print(*(f"{name} {version(name)}" for name in ("torch", "kornia", "albumentationsx", "numpy")), sep=", ")
boxes = {"head": [10.0, 10.0, 18.0, 18.0], "whole picture": [0.0, 0.0, 200.0, 100.0]}


def by_kornia(augmentation) -> list[list[float]]:
    both = kornia.augmentation.AugmentationSequential(augmentation, data_keys=["input", "bbox_xyxy"])
    return both(torch.zeros(1, 3, 100, 200), torch.tensor([list(boxes.values())]))[1][0].tolist()


def by_albumentations(augmentation) -> list[list[float]]:
    parameters = albumentations.BboxParams(coord_format="pascal_voc")
    both = albumentations.Compose([augmentation], bbox_params=parameters)
    return both(image=np.zeros((100, 200, 3), np.uint8), bboxes=list(boxes.values()))["bboxes"]


def rounded(found) -> dict[str, list[float]]:
    return {name: [round(float(number), 2) for number in box] for name, box in zip(boxes, found, strict=True)}


mirrored = rounded(by_kornia(kornia.augmentation.RandomHorizontalFlip(p=1)))
halved = rounded(by_kornia(kornia.augmentation.Resize((50, 100))))
mirrored_exactly = rounded(by_albumentations(albumentations.HorizontalFlip(p=1)))
halved_exactly = rounded(by_albumentations(albumentations.Resize(50, 100)))
print(f"mirrored by kornia: {mirrored}; by albumentations: {mirrored_exactly}")
print(f"half the size, kornia: {halved}; albumentations: {halved_exactly}")
assert mirrored_exactly == {"head": [182, 10, 190, 18], "whole picture": [0, 0, 200, 100]}
assert mirrored == {"head": [181, 10, 189, 18], "whole picture": [-1, 0, 199, 100]}
assert halved_exactly["whole picture"] == [0, 0, 100, 50] and halved["whole picture"] == [0, 0, 99.5, 49.49]
shared, both = 7 * 8, 9 * 8
print(f"IoU of the mirrored heads: {shared / both:.2f}")
PYTHON
