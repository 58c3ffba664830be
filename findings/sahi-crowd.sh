#!/usr/bin/env bash
# One would guess: a COCO file that SAHI reads and writes again, to cut it, merge it or leave a category out, keeps what each
# annotation says, or tells what it drops.
# Seen: iscrowd is 0 in all that it reads. A region marked as a crowd becomes one person, in the file and in its statistics;
# detections that score an average precision of 1.0 against the first file score 0.27 against the second.
# Versions: sahi 0.12.8, pycocotools 2.0.11. Python 3.11.
# Source: sahi/utils/coco.py, CocoAnnotation.from_coco_annotation_dict
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile sahi==0.12.8 pycocotools==2.0.11
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import copy
import io
from importlib.metadata import version

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sahi.utils.coco import Coco

print(*(f"{name} {version(name)}" for name in ("sahi", "pycocotools")), sep=", ")
people, crowd = [[10, 10, 40, 60], [60, 10, 40, 60]], [200, 0, 100, 100]
first = {
    "images": [{"id": 1, "file_name": "1.png", "width": 400, "height": 200}],
    "categories": [{"id": 1, "name": "person"}],
    "annotations": [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(box == crowd)}
        for n, box in enumerate([*people, crowd], 1)
    ],
}
read = Coco.from_coco_dict_or_path(copy.deepcopy(first))
second = read.json


def average_precision(truth: dict) -> float:
    """Of all people, three of them in the crowd."""
    found = [*people, [205, 5, 30, 30], [240, 5, 30, 30], [205, 50, 30, 30]]
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5 + n / 10} for n, box in enumerate(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(float(evaluation.stats[0]), 2)


for what, truth in ("first", first), ("written again", second):
    print(f"{what}: iscrowd {[a['iscrowd'] for a in truth['annotations']]}, AP {average_precision(truth)}")
people_counted = read.stats["num_annotations_per_category"]
print(f"statistics: {people_counted}")
assert [a["iscrowd"] for a in first["annotations"]] == [0, 0, 1] and average_precision(first) == 1.0
assert [a["iscrowd"] for a in second["annotations"]] == [0, 0, 0] and average_precision(second) == 0.27
assert people_counted == {"person": 3}
PYTHON
