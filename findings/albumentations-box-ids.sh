#!/usr/bin/env bash
# One would guess: what BboxParams(label_fields=...) carries along with the boxes comes back as it was given, for the boxes
# that a crop leaves. So it can carry the ids of the annotations.
# Seen: numbers are kept beside the coordinates in float32 and cannot all be held: above 16,777,216 an id comes back as
# another one, and a list of integers as floats. COCO's ids of crowds (900100448263) and ids made from dates are changed; two
# boxes then have one id. Ids given as strings come back as they were.
# Versions: torch 2.13.0, albumentationsx 2.5.1, numpy 2.4.6; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://albumentations.ai/docs/3-basic-usage/bounding-boxes-augmentations/
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 "albumentationsx[headless]==2.5.1" numpy==2.4.6
cd "$folder"
NO_ALBUMENTATIONS_UPDATE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import albumentations
import numpy as np

print(*(f"{name} {version(name)}" for name in ("torch", "albumentationsx", "numpy")), sep=", ")
crop = albumentations.Compose(
    [albumentations.Crop(x_max=100, y_max=100)],
    bbox_params=albumentations.BboxParams(coord_format="coco", label_fields=["ids"]),
)
frame = np.zeros((100, 200, 3), np.uint8)
boxes = [[10, 10, 20, 20], [40, 10, 20, 20], [70, 10, 20, 20]]  # all within the crop


def after(ids):
    return crop(image=frame, bboxes=boxes, ids=ids)["ids"]


small, crowds, dates = [1, 2, 3], [900100448263, 900100448264, 2190651], [20261201001, 20261201002, 20261201003]
for ids in small, crowds, dates, [str(number) for number in dates]:
    print(f"{ids} come back as {after(ids)}")
print(f"an array of int64, {np.array(dates)}, as {after(np.array(dates))}")
assert after(small) == small and all(type(number) is float for number in after(small))
assert after(crowds) == [900100456448, 900100456448, 2190651]
assert len(set(after(dates))) == 1 and len(set(after(np.array(dates)).tolist())) == 1
assert after([str(number) for number in dates]) == [str(number) for number in dates]
PYTHON
