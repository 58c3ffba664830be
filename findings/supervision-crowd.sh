#!/usr/bin/env bash
# One would guess: the detection metrics of supervision treat a COCO region marked iscrowd alike: no single person to be
# found, and no error to find people in it, as pycocotools and its own mean average precision do.
# Seen: Precision, Recall and F1Score take the region for one person. Of detections that pycocotools and supervision's
# MeanAveragePrecision give 1.0, precision is 0.4 and recall 0.67: each person found in the crowd is a false one, and the
# crowd itself is a person that was missed.
# Versions: supervision 0.31.2, pycocotools 2.0.11. Python 3.11.
# Source: https://supervision.roboflow.com/latest/metrics/f1_score/
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile supervision==0.31.2 pycocotools==2.0.11
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import supervision as sv
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from supervision.metrics import F1Score, MeanAveragePrecision, Precision, Recall

print(*(f"{name} {version(name)}" for name in ("supervision", "pycocotools")), sep=", ")
people, crowd = [[10, 10, 40, 60], [60, 10, 40, 60]], [200, 0, 100, 100]
found = [*people, [205, 5, 30, 30], [240, 5, 30, 30], [205, 50, 30, 30]]  # all people, three of them in the crowd
certainty = [0.8, 0.7, 0.95, 0.9, 0.85]
truth = {
    "images": [{"id": 1, "file_name": "1.png", "width": 400, "height": 200}],
    "categories": [{"id": 1, "name": "person", "supercategory": "none"}],
    "annotations": [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": int(box == crowd)}
        for n, box in enumerate([*people, crowd], 1)
    ],
}
Path("images").mkdir()
Image.new("RGB", (400, 200)).save("images/1.png")
Path("truth.json").write_text(json.dumps(truth))

with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO("truth.json")
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": s} for box, s in zip(found, certainty)]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()

[(_, _, targets)] = sv.DetectionDataset.from_coco("images", "truth.json")
corners = np.array([[x, y, x + width, y + height] for x, y, width, height in found], float)
predictions = sv.Detections(corners, confidence=np.array(certainty), class_id=np.zeros(5, int))
seen = {"pycocotools, AP at 0.5": float(evaluation.stats[1])}
fields = {MeanAveragePrecision: "map50", Precision: "precision_at_50", Recall: "recall_at_50", F1Score: "f1_50"}
for metric, field in fields.items():
    seen[f"supervision, {metric.__name__}"] = float(getattr(metric().update([predictions], [targets]).compute(), field))
seen = {name: round(value, 2) for name, value in seen.items()}
print("marked as a crowd, as read by supervision:", targets.data["iscrowd"].tolist())
print(*(f"{name}: {value}" for name, value in seen.items()), sep="\n")
assert targets.data["iscrowd"].tolist() == [0, 0, 1]
assert list(seen.values()) == [1.0, 1.0, 0.4, 0.67, 0.5]
PYTHON
