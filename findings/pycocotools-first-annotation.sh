#!/usr/bin/env bash
# One would guess: which ids the annotations of a COCO file have does not change its score, so long as each is used once.
# Seen: the evaluation writes the id of the matched annotation and reads 0 as "no match". The annotation with id 0 counts as
# missed and its detection as false. Label Studio's COCO export numbers from 0: boxes compared with themselves score less
# than 1. On a set with few of a class that is much.
# Versions: pycocotools 2.0.11, label-studio-sdk 2.1.2. Python 3.11.
# Source: pycocotools/cocoeval.py, evaluateImg and accumulate (dtMatches)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile pycocotools==2.0.11 label-studio-sdk==2.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import copy
import io
import json
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

print(*(f"{name} {version(name)}" for name in ("pycocotools", "label-studio-sdk")), sep=", ")
tasks = []
for number in range(4):
    Image.new("RGB", (100, 100)).save(f"{number}.png")
    box = {
        "from_name": "label",
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": 100,
        "original_height": 100,
        "value": {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["person"]},
    }
    tasks.append(
        {"id": number, "data": {"image": str(Path(f"{number}.png").resolve())}, "annotations": [{"result": [box]}]}
    )
Path("tasks.json").write_text(json.dumps(tasks))
converter = Converter(
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image"><Label value="person"/></RectangleLabels></View>',
    project_dir=".",
)
converter.convert_to_coco("tasks.json", "coco", output_image_dir="images", is_dir=False)
exported = json.loads(Path("coco/result.json").read_text())


def scores(content: dict) -> tuple[float, float]:
    """Average precision and recall of a file's own boxes, found with falling certainty."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        found = truth.loadRes(
            [
                {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9 - n / 10}
                for n, a in enumerate(content["annotations"])
            ]
        )
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(float(evaluation.stats[0]), 2), round(float(evaluation.stats[8]), 2)


from_1 = copy.deepcopy(exported)
for annotation in from_1["annotations"]:
    annotation["id"] += 1
print("ids as exported:", [a["id"] for a in exported["annotations"]], "AP and AR:", scores(exported))
print("ids from 1:     ", [a["id"] for a in from_1["annotations"]], "AP and AR:", scores(from_1))
assert [a["id"] for a in exported["annotations"]] == [0, 1, 2, 3]
assert scores(from_1) == (1.0, 1.0) and scores(exported) == (0.56, 0.75)
PYTHON
