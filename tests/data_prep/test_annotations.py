"""Files of annotation tools: objects of a class are counted picture by picture, and nothing is dropped in silence."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from preparing.annotations import count_class, read_annotations
from preparing.cctv import find_frames
from preparing.frame_names import FrameIndex, leave_off_folders
from preparing.labels import Labels, match_labels

TRUTH = {"a_1.jpg": 2, "a_2.jpg": 0, "a_3.jpg": 1}
CLASSES = {"a_1.jpg": ["person", "dog", "person"], "a_2.jpg": [], "a_3.jpg": ["dog", "person"]}


def write(path: Path, content: str | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(folder: Path) -> Path:
    names = ["animals", "person", "dog"]
    images = [{"id": 7 + place, "file_name": name, "width": 8, "height": 6} for place, name in enumerate(CLASSES)]
    marks = [(7 + place, name) for place, of_picture in enumerate(CLASSES.values()) for name in of_picture]
    annotations = [
        {"id": number, "image_id": image, "category_id": names.index(name), "bbox": [0, 0, 1, 1], "iscrowd": 0}
        for number, (image, name) in enumerate(marks)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return write(folder / "coco.json", {"images": images, "annotations": annotations, "categories": categories})


def cvat_images(folder: Path) -> Path:
    shapes = ("box", "polygon", "ellipse")
    images = "".join(
        f'<image id="{place}" name="{name}" width="8" height="6">'
        + "".join(f'<{shape} label="{label}"/>' for shape, label in zip(shapes, of_picture, strict=False))
        + '<tag label="rainy"/></image>'
        for place, (name, of_picture) in enumerate(CLASSES.items())
    )
    return write(folder / "cvat.xml", f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{images}</annotations>')


def cvat_video(folder: Path) -> Path:
    track = '<track id="{}" label="{}">{}</track>'
    box = '<box frame="{}" outside="{}" occluded="0"/>'
    tracks = (
        track.format(0, "person", box.format(1, 0) + box.format(2, 1)),
        track.format(1, "person", box.format(1, 0) + box.format(2, 1) + box.format(3, 0)),
        track.format(2, "dog", box.format(1, 0) + box.format(3, 0)),
    )
    meta = "<meta><task><start_frame>1</start_frame><stop_frame>3</stop_frame></task></meta>"
    return write(folder / "cvat.xml", f"<annotations>{meta}{''.join(tracks)}</annotations>")


def via_pictures(as_list: bool) -> dict[str, object]:
    pictures = {}
    for name, of_picture in CLASSES.items():
        regions = [{"shape_attributes": {"name": "rect"}, "region_attributes": {"type": label}} for label in of_picture]
        kept = regions if as_list else {str(place): region for place, region in enumerate(regions)}
        pictures[f"{name}123"] = {"filename": name, "size": 123, "regions": kept, "file_attributes": {}}
    return pictures


def via_project(folder: Path) -> Path:
    return write(folder / "via.json", {"_via_settings": {}, "_via_img_metadata": via_pictures(True)})


def via_one(folder: Path) -> Path:
    return write(folder / "via.json", via_pictures(False))


def via_table(folder: Path) -> Path:
    rows = ["filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"]
    for name, of_picture in CLASSES.items():
        rows += [f'{name},1,"{{}}",0,0,"{{}}","{{}}"'] if not of_picture else []
        for place, label in enumerate(of_picture):
            attributes = f'"{{""class"":{{""{label}"":true}}}}"'
            rows.append(f'{name},1,"{{}}",{len(of_picture)},{place},"{{""name"":""rect""}}",{attributes}')
    return write(folder / "via.csv", "\n".join(rows) + "\n")


def yolo(folder: Path) -> Path:
    write(folder / "set" / "data.yaml", "names: [dog, person]\nnc: 2\n")
    for name, of_picture in CLASSES.items():
        lines = "".join(f"{['dog', 'person'].index(label)} 0.5 0.5 0.1 0.1\n" for label in of_picture)
        write(folder / "set" / "labels" / f"{Path(name).stem}.txt", lines)
    return folder / "set" / "labels"


def yolo_numbered(folder: Path) -> Path:
    yolo(folder)
    write(folder / "set" / "data.yaml", "names:\n  0: dog\n  1: person\n")
    write(folder / "set" / "labels" / "train.txt", "images/a_1.jpg\n")
    return folder / "set" / "labels"


def voc(folder: Path) -> Path:
    for name, of_picture in CLASSES.items():
        objects = "".join(f"<object><name>{label}</name><bndbox/></object>" for label in of_picture)
        xml = f"<annotation><filename>{name}</filename>{objects}</annotation>"
        write(folder / "voc" / f"{Path(name).stem}.xml", xml)
    return folder / "voc"


def labelme(folder: Path) -> Path:
    for name, of_picture in CLASSES.items():
        shapes = [{"label": label, "points": [[0, 0]], "shape_type": "rectangle"} for label in of_picture]
        write(folder / "me" / f"{Path(name).stem}.json", {"imagePath": f"..\\{name}", "shapes": shapes})
    return folder / "me"


TOOLS = (coco, cvat_images, cvat_video, via_project, via_one, via_table, yolo, yolo_numbered, voc, labelme)


def read(path: Path, folder: Path, wanted: list[str] | None, names=TRUTH) -> tuple[dict[str, int], Labels]:
    for name in names:
        (folder / "frames" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / "frames" / name)
    frames = find_frames(folder / "frames")
    index = FrameIndex(frames, folder / "frames")
    labels = count_class(read_annotations(path), path, wanted)
    leave_off_folders(index, [label.key for label in labels.items])
    match_labels(labels, index)
    labelled = [frame for frame in frames if frame.label and not frame.label.problem]
    return {frame.image_id: frame.label.count for frame in labelled}, labels


def reasons(labels: Labels) -> list[str]:
    return [item.problem[0] for item in (*labels.marks, *labels.items) if item.problem]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_every_tool_gives_the_same_counts(tmp_path, tool):
    counts, labels = read(tool(tmp_path / "tool"), tmp_path, ["person"])
    assert counts == TRUTH
    assert reasons(labels) == []
    assert len(labels.marks) == 5
    assert "person counted in 3 pictures; marked are person (3), dog (2)" in labels.rules[0]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_of_several_classes_one_must_be_said(tmp_path, tool):
    path = tool(tmp_path / "tool")
    with pytest.raises(ValueError, match=r"person \(3\), dog \(2\): say which is counted, such as --class person"):
        read(path, tmp_path, None)
    with pytest.raises(ValueError, match=r"--class cat: .* marks person \(3\), dog \(2\)"):
        read(path, tmp_path, ["person", "cat"])
    assert read(path, tmp_path, ["Person", "dog"])[0] == {"a_1.jpg": 3, "a_2.jpg": 0, "a_3.jpg": 2}


def test_one_class_that_is_not_people_must_be_said_too(tmp_path):
    path = write(tmp_path / "yolo" / "a_1.txt", "0 0.5 0.5 0.1 0.1\n").parent
    with pytest.raises(ValueError, match=r"marks 0 \(1\): say which is counted"):
        read(path, tmp_path, None)
    write(path / "classes.txt", "pedestrian\n")
    assert read(path, tmp_path, None)[0] == {"a_1.jpg": 1}


def test_coco_names_what_cannot_be_counted(tmp_path):
    path = coco(tmp_path)
    content = json.loads(path.read_text("utf-8"))
    content["images"].append({"id": 50, "file_name": "a_4.jpg"})
    content["images"].append({"id": 60, "file_name": "gone.jpg"})
    content["annotations"] += [
        {"id": 90, "image_id": 50, "category_id": 1, "iscrowd": 1},
        {"id": 91, "image_id": 99, "category_id": 1},
        {"id": 92, "image_id": 9, "category_id": 42},
    ]
    path.write_text(json.dumps(content))
    counts, labels = read(path, tmp_path, ["person"], names=[*TRUTH, "a_4.jpg"])
    assert counts == {"a_1.jpg": 2, "a_2.jpg": 0}
    assert reasons(labels) == [
        "unknown_class",
        "crowd",
        "unknown_image",
        "mark_rejected",
        "mark_rejected",
        "missing_frame",
    ]
    assert len(labels.marks) == 8


def test_yolo_names_lines_that_are_none(tmp_path):
    folder = yolo(tmp_path)
    write(folder / "a_1.txt", "1 0.5 0.5 0.1 0.1\n1 0.5\n")
    write(folder / "a_3.txt", "7 0.5 0.5 0.1 0.1\n")
    counts, labels = read(folder, tmp_path, ["person"])
    assert counts == {"a_2.jpg": 0}
    assert reasons(labels) == ["not_yolo", "unknown_class", "mark_rejected", "mark_rejected"]
    assert labels.items[0].problem[1].startswith(f"its count is not known: {folder / 'a_1.txt'}:2: '1 0.5'")


def test_yolo_folders_of_several_splits_keep_apart(tmp_path):
    for split, number in (("train", 1), ("valid", 2)):
        write(tmp_path / "set" / split / "labels" / "a_1.txt", "0 0.5 0.5 0.1 0.1\n" * number)
    names = ("train/images/a_1.jpg", "valid/images/a_1.jpg")
    assert read(tmp_path / "set", tmp_path, ["0"], names)[0] == dict(zip(names, (1, 2), strict=True))


def test_a_region_count_that_is_not_true_leaves_the_picture_out(tmp_path):
    path = via_table(tmp_path)
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    counts, labels = read(path, tmp_path, ["person"])
    assert counts == {"a_1.jpg": 2, "a_2.jpg": 0}
    assert labels.items[2].problem == ("region_count", "region_count says 2, but there are 1 regions")


def test_a_row_per_box(tmp_path):
    rows = [f"{name},8,6,{label},0,0,1,1" for name, of_picture in CLASSES.items() for label in of_picture]
    path = write(tmp_path / "t.csv", "\n".join(["filename,width,height,class,xmin,ymin,xmax,ymax", *rows]))
    counts, labels = read(path, tmp_path, ["person"])
    assert counts == {"a_1.jpg": 2, "a_3.jpg": 1}  # a picture without a box is in no row: nobody counted it
    assert len(labels.marks) == 5


def test_voc_files_that_name_another_picture_are_left_out(tmp_path):
    folder = voc(tmp_path)
    (folder / "a_1.xml").rename(folder / "a_9.xml")
    counts, labels = read(folder, tmp_path, ["person"])
    assert counts == {"a_2.jpg": 0, "a_3.jpg": 1}
    assert reasons(labels) == ["two_names"]


def test_dots_on_heads(tmp_path):
    (tmp_path / "dots").mkdir()
    location = np.array([[1.0, 2.0], [3.0, 4.0]])
    for name, number in (("GT_a_1.mat", 2), ("GT_a_3.mat", 9)):
        image_info = {"location": location, "number": number}
        scipy.io.savemat(tmp_path / "dots" / name, {"image_info": image_info})
    scipy.io.savemat(tmp_path / "dots" / "a_2_ann.mat", {"annPoints": np.zeros((0, 2))})
    counts, labels = read(tmp_path / "dots", tmp_path, None)
    assert counts == {"a_1.jpg": 2, "a_2.jpg": 0}
    assert reasons(labels) == ["bad_count"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "x.json",
            '[{"data": {"image": "a.jpg"}, "annotations": []}]',
            "Label Studio's own JSON: export .* COCO or YOLO",
        ),
        ("x.json", '{"a": 1}', "JSON of no form that is known here"),
        ("x.json", '{"images": [', "x.json:1 is not JSON"),
        ("x.xml", "<kml/>", "begins with <kml>"),
        ("x.xml", "<annotations>", "is not XML"),
        ("x.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "declares a document type or entities"),
    ],
)
def test_other_files_are_named_with_what_to_do(tmp_path, name, content, told):
    with pytest.raises(ValueError, match=told):
        read_annotations(write(tmp_path / name, content))


def test_a_folder_of_several_kinds_is_asked_about(tmp_path):
    write(tmp_path / "a_1.txt", "")
    write(tmp_path / "a_1.xml", "<annotation/>")
    with pytest.raises(ValueError, match=r"found 1 .txt, 1 .xml"):
        read_annotations(tmp_path)
