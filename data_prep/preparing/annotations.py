"""Files of annotation tools as labels: the objects of a class are counted picture by picture.

Read are COCO JSON, CVAT XML (images and video), VIA (JSON and CSV), Pascal VOC and LabelMe folders, YOLO folders, tables
with one row per box, and the dots of ShanghaiTech and UCF-QNRF (.mat). The forms are plain, and the readers that exist
drop in silence what they do not understand; here every object is accounted for, and a picture of which one object is not
understood has no count.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy.io
import yaml

from finetuning.data.pictures import SUFFIXES, is_litter
from preparing.labels import Labels, plain
from preparing.records import Item, Label
from preparing.tables import Table, read_table, refuse_other_kinds
from preparing.text_files import normalise_name, read_text

# One of these, alone in a file, needs no --class.
PEOPLE = {
    "person",
    "persons",
    "people",
    "pedestrian",
    "pedestrians",
    "human",
    "humans",
    "head",
    "heads",
    "사람",
    "보행자",
    "머리",
}
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.names", "coco.names", "predefined_classes.txt")
LISTS_BESIDE = re.compile(r"(train|val|valid|validation|test)\.txt|readme.*", re.IGNORECASE)
COUNTED_SHAPES = ("box", "polygon", "ellipse", "mask", "cuboid", "skeleton", "points")
BOX_COLUMNS = {"xmin", "ymin", "xmax", "ymax"}
VIA_COLUMNS = {"filename", "region_count", "region_id", "region_shape_attributes", "region_attributes"}


@dataclass
class Picture:
    """What a tool's file says of one picture."""

    file: str
    line: int | None
    key: str  # the picture's name or number
    objects: list["Mark"] = field(default_factory=list)
    problem: tuple[str, str] | None = None


@dataclass(eq=False)
class Mark(Item):
    """One object that somebody marked; `name` is its class, None where the file knows none."""

    name: str | None = None


@dataclass
class Annotations:
    kind: str
    pictures: list[Picture]
    classes: list[str] = field(default_factory=list)  # those that the file declares, marked or not
    others: list[Mark] = field(default_factory=list)  # what belongs to no picture, each with its problem
    files: list[Path] = field(default_factory=list)


def read_annotations(path: Path) -> Annotations | None:
    """What an annotation tool wrote; None when `path` is a plain table. ValueError names what else it is."""
    if path.is_dir():
        return read_folder(path)
    if path.suffix.lower() == ".mat":
        return read_dots([path])
    refuse_other_kinds(path)
    text = read_text(path)
    start = text.lstrip()[:1]
    if start == "<":
        root = parse_xml(path, text)
        if root.tag == "annotation":
            return Annotations("Pascal VOC XML", [read_voc(path, root)], files=[path])
        return read_cvat(path, root)
    if start in ("{", "["):
        return read_json(path, text)
    table = read_table(path)
    names = {name.casefold() for name in table.header}
    if names >= VIA_COLUMNS:
        return read_via_table(path, table)
    if names >= BOX_COLUMNS and not names & {"count"}:
        return read_box_table(path, table)
    return None


def count_class(annotations: Annotations, path: Path, wanted: list[str] | None) -> Labels:
    """A label for each picture: how many objects of the wanted classes it has. ValueError where the class must be said."""
    valid = [mark for picture in annotations.pictures for mark in picture.objects if not mark.problem]
    classes = Counter(mark.name for mark in valid)
    told = ", ".join(f"{name or '(no class)'} ({number:,})" for name, number in classes.most_common()) or "none"
    if wanted:
        known = {name.casefold() for name in {*annotations.classes, *classes} if name}
        if unknown := [name for name in wanted if name.casefold() not in known]:
            raise ValueError(f"--class {' '.join(unknown)}: {path} marks {told}")
        counted = {name.casefold() for name in wanted}
    elif len(classes) > 1 or any(name and name.casefold() not in PEOPLE for name in classes):
        raise ValueError(
            f"{path} is {annotations.kind} that marks {told}: say which is counted, such as --class person"
        )
    else:
        counted = {(name or "").casefold() for name in classes}
    labels = Labels([], ["count"], files=annotations.files or [path])
    for picture in annotations.pictures:
        number = sum((mark.name or "").casefold() in counted for mark in picture.objects if not mark.problem)
        label = Label(picture.file, picture.line, picture.key, {"count": str(number)}, count=number)
        if picture.problem:
            label.reject(*picture.problem)
        elif bad := next((mark for mark in picture.objects if mark.problem), None):
            label.reject("mark_rejected", f"its count is not known: {bad.where}: {bad.problem[1]}")
        labels.items.append(label)
        labels.marks += picture.objects
    labels.marks += annotations.others
    shown = ", ".join(sorted(name for name in counted if name)) or "all marks"
    labels.rules.append(f"{annotations.kind}: {shown} counted in {len(labels.items):,} pictures; marked are {told}")
    return labels


def read_json(path: Path, text: str) -> Annotations:
    """COCO, VIA or LabelMe, told apart by their keys. Raises ValueError for what is none of them."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content:
        return read_coco(path, content)
    if isinstance(content, dict) and isinstance(content.get("_via_img_metadata", content), dict):
        pictures = content.get("_via_img_metadata", content)
        if pictures and all(
            isinstance(entry, dict) and {"filename", "regions"} <= set(entry) for entry in pictures.values()
        ):
            return read_via(path, pictures)
    if isinstance(content, dict) and "shapes" in content and "imagePath" in content:
        return Annotations("LabelMe JSON", [read_labelme(path, content)], files=[path])
    if isinstance(content, list) and content and all(isinstance(entry, dict) and "data" in entry for entry in content):
        raise ValueError(f"{path} is Label Studio's own JSON: export the project as COCO or YOLO")
    raise ValueError(
        f"{path} is JSON of no form that is known here: expected COCO (images, annotations, categories), VIA or LabelMe; "
        "or a table with a column for the frame and a column count"
    )


def read_coco(path: Path, content: dict[str, Any]) -> Annotations:
    """COCO: pictures without annotations count 0. A crowd region (iscrowd) is several people, nobody knows how many."""
    names = {
        entry.get("id"): str(entry.get("name")) for entry in content.get("categories") or [] if isinstance(entry, dict)
    }
    pictures: dict[Any, Picture] = {}
    read = Annotations("COCO JSON", [], list(names.values()), files=[path])
    for place, entry in enumerate(content["images"]):
        where = f"{path}#images[{place}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
            problem = ("bad_image", f"{entry!r:.80}: expected id and file_name")
            read.pictures.append(Picture(where, None, "", problem=problem))
            continue
        picture = Picture(where, None, entry["file_name"])
        if entry["id"] in pictures:
            picture.problem = ("duplicate_id", f"id {entry['id']!r} belongs to {pictures[entry['id']].key} already")
            pictures[entry["id"]].problem = picture.problem
        pictures.setdefault(entry["id"], picture)
        read.pictures.append(picture)
    marked: set[Any] = set()
    for place, entry in enumerate(content["annotations"] or []):
        mark = Mark(f"{path}#annotations[{place}]", None)
        entry = entry if isinstance(entry, dict) else {}
        picture = pictures.get(entry.get("image_id"))
        if entry.get("id") is not None and entry["id"] in marked:
            mark.reject("duplicate_id", f"another annotation has the id {entry['id']!r}")
        marked.add(entry.get("id"))
        if picture is None:
            mark.reject("unknown_image", f"image_id {entry.get('image_id')!r} is no image of this file")
        if entry.get("category_id") not in names:
            mark.reject("unknown_class", f"category_id {entry.get('category_id')!r} is no category of this file")
        mark.name = names.get(entry.get("category_id"))
        if entry.get("iscrowd"):
            mark.reject("crowd", "iscrowd marks several people at once: count them, or leave the picture out")
        (picture.objects if picture else read.others).append(mark)
    return read


def parse_xml(path: Path, text: str) -> ElementTree.Element:
    """The root of an XML file. Raises ValueError for what is not XML, or declares entities."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(
            f"{path} declares a document type or entities, which no annotation tool writes: it is not read"
        )
    try:
        return ElementTree.fromstring(text.encode())  # noqa: S314  no entities, see above
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML: {error}") from error


def read_cvat(path: Path, root: ElementTree.Element) -> Annotations:
    """CVAT for images: every picture is listed. CVAT for video: tracks, each with a box in the frames where it is seen."""
    if root.tag != "annotations":
        raise ValueError(
            f"{path} is XML that begins with <{root.tag}>: expected CVAT's <annotations> or VOC's <annotation>"
        )
    declared = [name.text or "" for name in root.iterfind("meta//label/name")]
    read = Annotations("CVAT XML", [], declared, files=[path])
    for place, image in enumerate(root.iterfind("image")):
        picture = Picture(f"{path}#image[{place}]", None, image.get("name") or "")
        for number, shape in enumerate(image):
            mark = Mark(f"{path}#image[{place}]/{shape.tag}[{number}]", None, name=shape.get("label"))
            check_shape(mark, shape)
            if shape.tag != "tag":  # a tag is said of the whole picture
                picture.objects.append(mark)
        read.pictures.append(picture)
    tracks = list(root.iterfind("track"))
    if read.pictures and tracks:
        raise ValueError(f"{path} holds both images and tracks: export one of the two")
    if not tracks:
        return read
    read.kind = "CVAT XML of a video"
    seen = [int(shape.get("frame", "-1")) for track in tracks for shape in track]
    first, last = (root.findtext(f"meta//{name}") for name in ("start_frame", "stop_frame"))
    frames = range(int(first or min(seen)), int(last or max(seen)) + 1)
    pictures = {number: Picture(f"{path}#frame[{number}]", None, str(number)) for number in frames}
    for place, track in enumerate(tracks):
        for shape in track:
            number = int(shape.get("frame", "-1"))
            mark = Mark(f"{path}#track[{place}]/{shape.tag}[{number}]", None, name=track.get("label"))
            if shape.get("outside") == "1":
                continue  # the object has left the picture
            check_shape(mark, shape)
            if number not in pictures:
                mark.reject("unknown_image", f"frame {number} is none of {frames.start} to {frames.stop - 1}")
            (pictures[number].objects if number in pictures else read.others).append(mark)
    read.pictures = list(pictures.values())
    return read


def check_shape(mark: Mark, shape: ElementTree.Element) -> None:
    """Reject a shape of CVAT that is no single object."""
    if shape.tag not in (*COUNTED_SHAPES, "tag"):
        mark.reject(
            "unknown_shape", f"a {shape.tag} is no object that can be counted: expected {', '.join(COUNTED_SHAPES)}"
        )
    elif shape.tag == "points" and ";" in (shape.get("points") or ""):
        mark.reject(
            "several_points", "one shape holds several points: one object, or one each? Draw one shape per person"
        )


def read_via(path: Path, pictures: dict[str, Any]) -> Annotations:
    """VIA 1 keeps regions in an object, VIA 2 in a list."""
    read = Annotations("VIA JSON", [], files=[path])
    for key, entry in pictures.items():
        where = f"{path}#{key}"
        picture = Picture(where, None, str(entry["filename"]))
        regions = entry["regions"]
        regions = list(regions.values()) if isinstance(regions, dict) else regions or []
        for place, region in enumerate(regions):
            mark = Mark(f"{where}#regions[{place}]", None)
            if not isinstance(region, dict) or not region.get("shape_attributes"):
                mark.reject("bad_region", f"{region!r:.80}: expected shape_attributes")
            else:
                name_region(mark, region.get("region_attributes"))
            picture.objects.append(mark)
        read.pictures.append(picture)
    return read


def name_region(mark: Mark, attributes: Any) -> None:
    """The class of a VIA region: the value of its one attribute, or of that which is called class, type, name or label."""
    values = {}
    for key, value in (attributes if isinstance(attributes, dict) else {}).items():
        if isinstance(value, dict):  # tick boxes: {"person": true}
            value = ", ".join(name for name, ticked in value.items() if ticked is True or ticked == "true")
        if value not in ("", None):
            values[plain(str(key))] = str(value).strip()
    named = [values[key] for key in ("class", "type", "name", "label", "category", "object") if key in values]
    if not named and len(values) > 1:
        mark.reject("unknown_class", f"which of its attributes {', '.join(values)} is the class? Call that one class")
    mark.name = named[0] if named else next(iter(values.values()), None)


def read_via_table(path: Path, table: Table) -> Annotations:
    """VIA's CSV: a row per region; a picture without one has a row with region_count 0."""
    read = Annotations("VIA CSV", [], files=[path])
    pictures: dict[str, Picture] = {}
    told: dict[str, set[str]] = {}
    names = [name.casefold() for name in table.header]
    for line, cells in table.rows:
        row = dict(zip(names, cells, strict=False))
        mark = Mark(str(path), line)
        if len(cells) != len(names):
            mark.reject("wrong_number_of_cells", f"{len(cells)} cells under {len(names)} columns")
            read.others.append(mark)
            continue
        picture = pictures.setdefault(row["filename"], Picture(f"{path}#{row['filename']}", None, row["filename"]))
        told.setdefault(row["filename"], set()).add(row["region_count"])
        if row["region_count"] == "0":
            continue
        shape, attributes = (parse_cell(row[name]) for name in ("region_shape_attributes", "region_attributes"))
        if not isinstance(shape, dict) or not shape or not isinstance(attributes, dict):
            mark.reject("bad_region", f"{row['region_shape_attributes']!r:.80}: expected the JSON of a region")
        else:
            name_region(mark, attributes)
        picture.objects.append(mark)
    for name, picture in pictures.items():
        if told[name] != {str(len(picture.objects))}:
            said = " and ".join(sorted(told[name]))
            picture.problem = (
                "region_count",
                f"region_count says {said}, but there are {len(picture.objects)} regions",
            )
    read.pictures = list(pictures.values())
    return read


def parse_cell(text: str) -> Any:
    """JSON of a table's cell; None where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_box_table(path: Path, table: Table) -> Annotations:
    """A row per box, as Roboflow and TensorFlow write them: filename, class, xmin, ymin, xmax, ymax."""
    names = [plain(name) for name in table.header]
    key_at = next(
        (names.index(name) for name in ("filename", "imagename", "image", "file", "path", "frame") if name in names), 0
    )
    class_at = next(
        (names.index(name) for name in ("class", "classname", "label", "category", "name") if name in names), None
    )
    read = Annotations("a table with one row per box", [], files=[path])
    pictures: dict[str, Picture] = {}
    for line, cells in table.rows:
        mark = Mark(str(path), line)
        if len(cells) != len(names) or not cells[key_at]:
            mark.reject(
                "wrong_number_of_cells", f"{len(cells)} cells under {len(names)} columns, or no picture is named"
            )
            read.others.append(mark)
            continue
        key = cells[key_at]
        mark.name = cells[class_at] or None if class_at is not None else None
        pictures.setdefault(key, Picture(f"{path}#{key}", None, key)).objects.append(mark)
    read.pictures = list(pictures.values())
    return read


def read_folder(folder: Path) -> Annotations:
    """A folder with one file per picture: YOLO (.txt), Pascal VOC (.xml), LabelMe (.json) or dots (.mat)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_litter(path))
    of_kind: dict[str, list[Path]] = {}
    for path in files:
        suffix = path.suffix.lower()
        beside = path.name.lower() in NAME_FILES or LISTS_BESIDE.fullmatch(path.name) or suffix in SUFFIXES
        if suffix in (".txt", ".xml", ".json", ".mat") and not beside:
            of_kind.setdefault(suffix, []).append(path)
    if len(of_kind) != 1:
        found = ", ".join(f"{len(paths):,} {suffix}" for suffix, paths in of_kind.items()) or "none"
        raise ValueError(
            f"--labels {folder} is a folder: expected one file per picture, all of one kind: .txt (YOLO), .xml (Pascal VOC), "
            f".json (LabelMe) or .mat (dots); found {found}. A single file of a tool is given by its own name"
        )
    (suffix, paths), *_ = of_kind.items()
    if suffix == ".txt":
        return read_yolo(folder, paths, files)
    if suffix == ".mat":
        return read_dots(paths)
    texts = {path: read_text(path) for path in paths}
    if suffix == ".xml":
        roots = {path: parse_xml(path, text) for path, text in texts.items()}
        if wrong := next((path for path, root in roots.items() if root.tag != "annotation"), None):
            raise ValueError(f"{wrong} is no Pascal VOC file: give a file of CVAT by its own name")
        return Annotations("Pascal VOC XML", [read_voc(path, root) for path, root in roots.items()], files=paths)
    contents = {path: parse_cell(text) for path, text in texts.items()}
    if wrong := next((path for path, content in contents.items() if not is_labelme(content)), None):
        raise ValueError(f"{wrong} is no LabelMe file (shapes, imagePath): give a file of COCO or VIA by its own name")
    return Annotations("LabelMe JSON", [read_labelme(path, content) for path, content in contents.items()], files=paths)


def is_labelme(content: Any) -> bool:
    """Whether a JSON file is LabelMe's: shapes, and the path of a picture."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("shapes"), list)
        and isinstance(content.get("imagePath"), str)
    )


def read_labelme(path: Path, content: dict[str, Any]) -> Picture:
    """One picture and its shapes, from a file of LabelMe."""
    picture = Picture(str(path), None, content["imagePath"].replace("\\", "/").removeprefix("../"))
    for place, shape in enumerate(content["shapes"]):
        mark = Mark(f"{path}#shapes[{place}]", None)
        mark.name = shape.get("label") if isinstance(shape, dict) else None
        if not mark.name:
            mark.reject("unknown_class", f"{shape!r:.80}: expected a label")
        picture.objects.append(mark)
    return picture


def read_voc(path: Path, root: ElementTree.Element) -> Picture:
    """The file's own name wins: tools leave another file's name inside when annotations are copied."""
    inside = normalise_name(root.findtext("filename") or "")
    picture = Picture(str(path), None, inside or path.stem)
    if inside and inside.rpartition(".")[0] != normalise_name(path.stem):
        picture.problem = ("two_names", f"it is called {path.name}, and says inside that it is of {inside}: rename one")
    for place, entry in enumerate(root.iterfind("object")):
        mark = Mark(f"{path}#object[{place}]", None, name=entry.findtext("name"))
        if not mark.name:
            mark.reject("unknown_class", "an object without a name")
        picture.objects.append(mark)
    return picture


def read_yolo(folder: Path, paths: list[Path], files: list[Path]) -> Annotations:
    """A line per object: the class's number, then numbers from 0 to 1. An empty file is a picture without objects."""
    names = class_names(folder, files)
    read = Annotations("YOLO labels", [], [name for _, name in sorted(names.items())], files=paths)
    for path in paths:
        inside = "/".join(part for part in path.relative_to(folder).with_suffix("").parts if part != "labels")
        picture = Picture(str(path), None, inside)
        for line, text in enumerate(read_text(path).splitlines(), start=1):
            if not text.strip():
                continue
            mark = Mark(str(path), line)
            cells = text.split()
            if len(cells) < 5 or not all(
                re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", cell, re.IGNORECASE) for cell in cells
            ):
                mark.reject("not_yolo", f"{text.strip()!r:.60}: expected a class number and at least four numbers")
            elif not cells[0].isdecimal() or (names and int(cells[0]) not in names):
                mark.reject("unknown_class", f"class {cells[0]} is none of {len(names)} classes")
            else:
                mark.name = names.get(int(cells[0]), cells[0])
            picture.objects.append(mark)
        read.pictures.append(picture)
    return read


def class_names(folder: Path, files: Iterable[Path]) -> dict[int, str]:
    """{number: class} of classes.txt or data.yaml, in the folder or up to two folders above it; {} when there is none."""
    above = [
        path for parent in list(folder.resolve().parents)[:2] for path in sorted(parent.iterdir()) if path.is_file()
    ]
    for path in [*files, *above]:
        if path.name.lower() in NAME_FILES:
            names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            return dict(enumerate(names))
        if path.name.lower() in ("data.yaml", "data.yml", "dataset.yaml"):
            try:
                names = (yaml.safe_load(read_text(path)) or {}).get("names")
            except (yaml.YAMLError, AttributeError) as error:
                raise ValueError(f"{path} is no YAML with names: {error}") from error
            if isinstance(names, dict):
                return {int(number): str(name) for number, name in names.items()}
            if isinstance(names, list):
                return dict(enumerate(map(str, names)))
    return {}


def read_dots(paths: list[Path]) -> Annotations:
    """Dots on heads: GT_IMG_1.mat is of IMG_1 (ShanghaiTech), img_0001_ann.mat of img_0001 (UCF-QNRF)."""
    return Annotations("dots on heads (.mat)", list(read_dot_files(paths)), files=paths)


def read_dot_files(paths: list[Path]) -> Iterator[Picture]:
    """Pictures and their dots from MATLAB files (ShanghaiTech, UCF). Raises ValueError for what cannot be read."""
    for path in paths:
        key = re.sub(r"^GT_", "", path.stem, flags=re.IGNORECASE)
        key = re.sub(r"_ann$", "", key, flags=re.IGNORECASE)
        picture = Picture(str(path), None, key)
        try:
            content = scipy.io.loadmat(path, simplify_cells=True)
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise ValueError(f"{path} is no MATLAB file that can be read ({error}): save it with -v7") from error
        info = content.get("image_info")
        dots = content.get("annPoints") if info is None else info.get("location") if isinstance(info, dict) else None
        if dots is None:
            found = ", ".join(name for name in content if not name.startswith("__"))
            raise ValueError(
                f"{path} holds {found}: expected image_info.location (ShanghaiTech) or annPoints (UCF-QNRF)"
            )
        number = dots.size // 2
        if isinstance(info, dict) and "number" in info and int(info["number"]) != number:
            picture.problem = ("bad_count", f"it says {int(info['number'])} heads and marks {number}")
        picture.objects = [Mark(f"{path}#{place}", None) for place in range(number)]
        yield picture
