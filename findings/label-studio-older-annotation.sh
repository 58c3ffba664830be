#!/usr/bin/env bash
# One would guess: a frame that was labelled a second time, corrected, is exported with its last annotation, and a frame
# labelled "nobody" is exported as one without boxes.
# Seen: YOLO and Pascal VOC keep the first annotation: annotations are sorted newest first, each overwrites the file of the
# one before. COCO lists the picture twice, with the boxes of both. Pascal VOC leaves the frame without people out, so a
# count of 0 is lost; a line in the log says "No annotations found", all exports end without an error.
# Versions: label-studio-sdk 2.1.2. Python 3.11.
# Source: label_studio_sdk/converter/converter.py, annotation_result_from_task
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile label-studio-sdk==2.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from label_studio_sdk.converter import Converter
from PIL import Image

print("label-studio-sdk", version("label-studio-sdk"))
for name in ("corrected", "once", "nobody"):
    Image.new("RGB", (100, 100)).save(f"{name}.png")


def annotated(day: int, people: int) -> dict:
    """An annotation of a day: so many boxes, as Label Studio writes them."""
    boxes = [
        {
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "original_width": 100,
            "original_height": 100,
            "value": {"x": 10 * n, "y": 10, "width": 5, "height": 5, "rotation": 0, "rectanglelabels": ["person"]},
        }
        for n in range(people)
    ]
    return {"id": day, "created_at": f"2026-11-{day:02}T09:00:00Z", "was_cancelled": False, "result": boxes}


work = {"corrected": [annotated(1, 2), annotated(2, 5)], "once": [annotated(3, 1)], "nobody": [annotated(4, 0)]}
tasks = [
    {"id": number, "data": {"image": str(Path(f"{name}.png").resolve())}, "annotations": annotations}
    for number, (name, annotations) in enumerate(work.items())
]
Path("tasks.json").write_text(json.dumps(tasks))
converter = Converter(
    '<View><Image name="image" value="$image"/>'
    '<RectangleLabels name="label" toName="image"><Label value="person"/></RectangleLabels></View>',
    project_dir=".",
)
converter.convert_to_yolo("tasks.json", "yolo", output_image_dir="images", output_label_dir="yolo", is_dir=False)
converter.convert_to_voc("tasks.json", "voc", output_image_dir="images", is_dir=False)
converter.convert_to_coco("tasks.json", "coco", output_image_dir="images", is_dir=False)

coco = json.loads(Path("coco/result.json").read_text())
names = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
counted = {
    "YOLO": {p.stem: len(p.read_text().splitlines()) for p in Path("yolo").glob("*.txt") if p.stem != "classes"},
    "VOC": {p.stem: p.read_text().count("<object>") for p in Path("voc").rglob("*.xml")},
    "COCO": dict(Counter(names[mark["image_id"]] for mark in coco["annotations"])),
}
print("labelled: corrected from 2 to 5, once 1, nobody 0")
for form, people in counted.items():
    print(f"{form}: {dict(sorted(people.items()))}")
print("pictures that COCO lists:", sorted(names.values()))
assert counted["YOLO"] == {"corrected": 2, "once": 1, "nobody": 0}
assert counted["VOC"] == {"corrected": 2, "once": 1}
assert counted["COCO"] == {"corrected": 7, "once": 1}
assert sorted(names.values()) == ["corrected", "corrected", "nobody", "once"]
PYTHON
