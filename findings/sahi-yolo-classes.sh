#!/usr/bin/env bash
# One would guess: SAHI's export of a COCO file as YOLO writes class numbers that fit the names which it writes beside them.
# Seen: the label files hold COCO's category ids, the list of names counts from 0. COCO's own ids begin at 1 (person 1,
# bicycle 2): supervision reads every person back as a bicycle, without a word. The last category of a file gets a number
# that the list does not have. remapping_dict={1: 0, 2: 1} at reading gives numbers that fit.
# Versions: sahi 0.12.8, supervision 0.31.2. Python 3.11.
# Source: https://obss.github.io/sahi/coco/
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile sahi==0.12.8 supervision==0.31.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import supervision as sv
from PIL import Image
from sahi.utils.coco import Coco, export_coco_as_yolo

print(*(f"{name} {version(name)}" for name in ("sahi", "supervision")), sep=", ")
Path("images").mkdir()
Image.new("RGB", (100, 100)).save("images/1.png")
boxes = [10, 10, 20, 40], [40, 10, 20, 40], [70, 10, 20, 40]
truth = {
    "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 100}],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}],
    "annotations": [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 800, "iscrowd": 0}
        for n, box in enumerate(boxes, 1)
    ],
}
Path("truth.json").write_text(json.dumps(truth))


def written_and_read(folder: str, **how) -> tuple[list[str], list[str]]:
    """Class numbers in the label file, and the names that they are read back with."""
    coco = Coco.from_coco_dict_or_path("truth.json", image_dir="images", **how)
    export_coco_as_yolo(folder, train_coco=coco, val_coco=coco, disable_symlink=True)
    numbers = [line.split()[0] for line in Path(folder, "train", "1.txt").read_text().splitlines()]
    [(_, _, read)] = sv.DetectionDataset.from_yolo(f"{folder}/train", f"{folder}/train", f"{folder}/data.yml")
    return numbers, read.data["class_name"].tolist()


as_it_is = written_and_read("as_it_is")
remapped = written_and_read("remapped", remapping_dict={1: 0, 2: 1})
print(f"three people, numbers written, names read: {as_it_is}; with remapping_dict: {remapped}")
assert as_it_is == (["1"] * 3, ["bicycle"] * 3) and remapped == (["0"] * 3, ["person"] * 3)
PYTHON
