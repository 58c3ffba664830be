"""CCTV frames, head counts and question templates: reads all three and finds everything that is wrong with them."""

import functools
import os
import re
import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preparing.conversations import RESERVED_COLUMNS, read_turns
from preparing.images import find_inside, inspect_images, is_inside
from preparing.ledger import Ledger
from preparing.text_files import csv_rows, json_items, normalise_name, read_text

# Data preparation imports nothing else of training: a label must be read by the very function that scores answers.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from finetuning.data.pictures import SUFFIXES
from finetuning.tasks.count_parser import parse_count

TEXT_TURN = re.compile(
    r"^\s*(?P<role>user|assistant|system|image|사용자|어시스턴트|시스템|이미지)\s*[:：]\s*(?P<text>.*)$", re.IGNORECASE
)
TEXT_ROLES = {"사용자": "user", "어시스턴트": "assistant", "시스템": "system", "이미지": "image"}


@dataclass(eq=False)
class Item:
    """Something that was read and must be accounted for; the first problem found is the one reported."""

    file: str
    line: int | None
    problem: tuple[str, str] | None = field(default=None, init=False)

    def reject(self, reason: str, detail: str) -> None:
        self.problem = self.problem or (reason, detail)


@dataclass(eq=False)
class Label(Item):
    key: str  # frame number or file name, as written
    values: dict[str, str]  # what templates may use: every column, count as a plain number
    count: int = -1
    frame: "Frame | None" = None


@dataclass(eq=False)
class Frame(Item):
    image_id: str  # path inside the frames folder
    path: Path
    video: str  # the folder it lies in
    time: int = 0  # frame number in the file name; its place in the folder where numbers are missing or repeat
    label: Label | None = None
    sha256: str = ""
    difference_hash: bytes = b""


@dataclass(eq=False)
class Dialogue(Item):
    messages: list[dict[str, str]]  # with placeholders
    image: str | None  # the only frame it is for
    frame: Frame | None = None
    fields: list[set[str]] = field(default_factory=list)  # placeholders of each message


def find_frames(folder: Path) -> list[Frame]:
    """Every file below `folder`, in order of folder and frame number; what is no image carries its problem."""
    frames = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]  # os.walk does not enter them
        for name in [*files, *linked]:
            path = Path(parent) / name
            video = path.parent.relative_to(folder).as_posix()
            frame = Frame(str(path), None, image_id=path.relative_to(folder).as_posix(), path=path, video=video)
            if not is_inside(path, folder):
                frame.reject("outside_folder", f"it links to {path.resolve()}, outside {folder}")
            elif not path.is_file():
                frame.reject("not_an_image", "it is a link to a folder, or no regular file")
            elif path.suffix.lower() not in SUFFIXES:
                frame.reject("not_an_image", f"expected one of {' '.join(SUFFIXES)}")
            frames.append(frame)
    frames.sort(key=lambda frame: (frame.video, natural_order(frame.path.name)))
    for video in {frame.video for frame in frames}:
        of_video = [frame for frame in frames if frame.video == video and not frame.problem]
        numbers = [frame_number(frame.path.stem) for frame in of_video]
        if None in numbers or len(set(numbers)) < len(numbers):
            numbers = list(range(len(of_video)))
        for frame, number in zip(of_video, numbers, strict=True):
            frame.time = number
    return frames


def natural_order(name: str) -> list[Any]:
    """Sort key that puts frame_2 before frame_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", normalise_name(name))
    ]


def frame_number(text: str) -> int | None:
    digits = re.search(r"(\d+)$", text, re.ASCII)
    return int(digits[1]) if digits else None


def read_labels(path: Path) -> tuple[list[Label], list[str]]:
    """(labels, names of all columns). ValueError when the header cannot be used."""
    rows = csv_rows(path)
    _, header = next(rows, (1, []))
    problems = []
    if header.count("count") != 1 or header.index("count") == 0:
        problems.append("expected a first column that names the frame, and one other column called count")
    if "" in header or len(set(header)) < len(header):
        problems.append("expected every column to have a name of its own")
    if taken := [name for name in header[1:] if name in RESERVED_COLUMNS]:
        problems.append(f"{', '.join(taken)} means something else to training, choose another name")
    if problems:
        raise ValueError(f"{path} opens with the columns {', '.join(header) or '(none)'}: " + "; ".join(problems))
    labels = []
    for line, cells in rows:
        if len(cells) != len(header):
            label = Label(str(path), line, key=cells[0], values={})
            label.reject("wrong_number_of_cells", f"{len(cells)} cells under {len(header)} columns")
        else:
            label = Label(str(path), line, key=cells[0], values=dict(zip(header, cells, strict=True)))
            # 7.0 is how spreadsheets and pandas write 7 in a column with gaps.
            if re.fullmatch(r"\d{1,9}(\.0*)?", label.values["count"], re.ASCII):
                label.count = int(label.values["count"].partition(".")[0])
                label.values["count"] = str(label.count)
            else:
                given = label.values["count"]
                label.reject("bad_count", f"count is {given!r}, expected a whole number of people, 0 or more")
        labels.append(label)
    return labels, header


def names_of(frame: Frame) -> list[str]:
    """The ways to name a frame, most exact first: path in the folder, file name, stem, frame number."""
    number = frame_number(frame.path.stem)
    names = [normalise_name(name) for name in (frame.image_id, frame.path.name, frame.path.stem)]
    return names if number is None else [*names, f"number {number}"]


class FrameIndex:
    def __init__(self, frames: Iterable[Frame], folder: Path) -> None:
        self.folder = folder
        self.frames: dict[str, list[Frame]] = {}
        # A text file beside each picture must not make their common stem ambiguous.
        for frame in (frame for frame in frames if frame.path.suffix.lower() in SUFFIXES):
            for name in dict.fromkeys(names_of(frame)):
                self.frames.setdefault(name, []).append(frame)

    def find(self, key: str) -> Frame | tuple[str, str]:
        """The frame that a label or dialogue names, or (reason, detail) when there is not exactly one."""
        wanted = [normalise_name(key)]
        if re.fullmatch(r"\d+(\.0*)?", key, re.ASCII):
            wanted.append(f"number {int(key.partition('.')[0])}")
        for name in wanted:
            if found := self.frames.get(name):
                if len(found) == 1:
                    return found[0]
                ids = ", ".join(frame.image_id for frame in found[:3])
                return "ambiguous_frame", f"{key!r} fits {len(found)} files ({ids}): write the path inside the folder"
        found = find_inside(key.strip(), self.folder)
        if isinstance(found, tuple) and found[0] != "missing_image":
            return found
        return "missing_frame", f"{key!r} fits no image in {self.folder}"


def match_labels(labels: list[Label], index: FrameIndex) -> None:
    """Ties each label to its frame. Of labels that agree the first counts; of labels that do not, none does."""
    of_frame: dict[int, list[Label]] = {}
    for label in labels:
        if not label.key:
            label.reject("missing_frame", "the first cell is empty, expected a frame number or file name")
            continue
        found = index.find(label.key)
        if isinstance(found, Frame):
            label.frame = found
            of_frame.setdefault(id(found), []).append(label)
        else:
            label.reject(*found)
    for rivals in of_frame.values():
        usable = [label for label in rivals if not label.problem]
        lines = ", ".join(str(label.line) for label in rivals)
        conflicting = len({tuple(list(label.values.values())[1:]) for label in usable}) > 1
        for label in usable if conflicting else []:
            label.reject("conflicting_labels", f"lines {lines} label the same frame differently")
        for label in usable[1:]:
            label.reject("duplicate_label", f"lines {lines} say the same of one frame")
        rivals[0].frame.label = next((label for label in usable if not label.problem), rivals[0])


def read_dialogues(path: Path) -> list[Dialogue]:
    """The dialogues of messages.txt in either form, each with its first problem, if any."""
    text = read_text(path)
    dialogues = []
    for line, raw, image in read_json(path, text) if text.lstrip().startswith(("[", "{")) else read_plain(text):
        turns = read_turns(raw)
        dialogue = Dialogue(str(path), line, messages=turns.messages, image=image if isinstance(image, str) else None)
        if image is not None and not isinstance(image, str):
            dialogue.reject("bad_image", f"image is {image!r:.80}, expected the name of one frame")
        if turns.problems:
            dialogue.reject(turns.problems[0][0], "; ".join(detail for _, detail in turns.problems))
        elif turns.num_image_marks > 1:
            dialogue.reject("image_mark_count", f"{turns.num_image_marks} image marks, but each row has one frame")
        dialogues.append(dialogue)
    return dialogues


def read_json(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    """(line, turns, image or None) of each conversation: a list of messages, or an object that holds one."""
    items = list(json_items(path, text))
    if items and all(isinstance(item, dict) and "role" in item for _, item in items):
        items = [(items[0][0], [item for _, item in items])]
    for line, item in items:
        if not isinstance(item, dict):
            yield line, item, None
            continue
        image = item.get("image") or item.get("images") or None
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        yield line, item.get("messages"), image


def read_plain(text: str) -> Iterator[tuple[int, Any, str | None]]:
    """(line, turns, image or None) of each block between blank lines. A line that opens no turn continues the last."""
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1)]
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in lines:
        if line.strip():
            blocks[-1].append((number, line))
        elif blocks[-1]:
            blocks.append([])
    for block in filter(None, blocks):
        turns: list[Any] = []
        images = []
        for _, line in block:
            turn = TEXT_TURN.match(line)
            if not turn and turns and isinstance(turns[-1], dict):
                turns[-1]["content"] += "\n" + line.strip()
                continue
            if not turn:
                turns.append(line.strip())  # no turn is open: read_turns reports the text
                continue
            role = TEXT_ROLES.get(turn["role"], turn["role"].lower())
            if role == "image":
                images.append(turn["text"].strip())
            else:
                turns.append({"role": role, "content": turn["text"].strip()})
        yield block[0][0], turns, images if len(images) > 1 else (images[0] if images else None)


def check_templates(dialogues: list[Dialogue], columns: list[str]) -> None:
    """Every brace must be a column of labels.csv; all that is wrong with a dialogue goes into one detail."""
    first_lines: dict[tuple[Any, ...], int | None] = {}
    for dialogue in dialogues:
        if dialogue.problem:
            continue
        problems = []
        for message in dialogue.messages:
            names = set()
            try:
                for _, name, format_spec, conversion in string.Formatter().parse(message["content"]):
                    if name is None:
                        continue
                    names.add(name)
                    if name not in columns or format_spec or conversion:
                        written = f"{{{name}{'!' + conversion if conversion else ''}{':' + format_spec if format_spec else ''}}}"
                        problems.append(f"{written} is no column in braces, expected one of {', '.join(columns)}")
            except ValueError as error:
                problems.append(f"{message['content']!r:.60}: {error} (a brace that is meant is written twice)")
            dialogue.fields.append(names)
        if problems:
            dialogue.reject("bad_template", "; ".join(dict.fromkeys(problems)))
            continue
        content = (dialogue.image, *((message["role"], message["content"]) for message in dialogue.messages))
        if content in first_lines:
            dialogue.reject("duplicate_dialogue", f"it says the same as line {first_lines[content]}")
        first_lines.setdefault(content, dialogue.line)


def fill_in(template: str, values: dict[str, str]) -> str:
    """Like str.format, but a column may be called `a.b` or `7`, and nothing but columns is ever looked up."""
    parts = string.Formatter().parse(template)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def tie_dialogues(dialogues: list[Dialogue], index: FrameIndex) -> None:
    for dialogue in dialogues:
        if dialogue.problem or dialogue.image is None:
            continue
        found = index.find(dialogue.image)
        if isinstance(found, Frame):
            dialogue.frame = found
        else:
            dialogue.reject(*found)


def check_empty_cells(dialogues: list[Dialogue], labels: list[Label]) -> None:
    """A template cannot fill in an empty cell: without its value a label is no use to a dialogue for any frame."""
    for_any = [dialogue for dialogue in dialogues if not dialogue.problem and not dialogue.frame]
    needed = set().union(*(names for dialogue in for_any for names in dialogue.fields))
    for label in labels:
        if not label.problem and (empty := sorted(name for name in needed if not label.values[name])):
            label.reject("empty_cell", f"{', '.join(empty)} is empty, but messages.txt uses it")


def check_numbers(dialogues: list[Dialogue], frames: list[Frame]) -> None:
    """Rejects answers whose number, read as the scorer reads it, is not the label of a frame they are for."""
    read_number = functools.lru_cache(maxsize=None)(parse_count)
    for dialogue in dialogues:
        if dialogue.problem:
            continue
        for frame in [dialogue.frame] if dialogue.frame else frames:
            label = frame.label
            if dialogue.frame and any(not label.values[name] for name in set().union(*dialogue.fields)):
                dialogue.reject("empty_cell", f"a column it uses is empty in {label.file}:{label.line}")
                break
            for message, names in zip(dialogue.messages, dialogue.fields, strict=True):
                # An answer made of other columns alone states those, not the number of people.
                if message["role"] != "assistant" or (names and "count" not in names):
                    continue
                answer = fill_in(message["content"], label.values)
                stated = read_number(answer)
                if stated is not None and stated != label.count:
                    detail = f"{answer!r:.80} says {stated}, but {label.file}:{label.line} says {label.count}"
                    advice = "" if dialogue.frame else "; use {count}, or tie the dialogue to a frame with IMAGE:"
                    dialogue.reject("contradicts_label", detail + advice)
            if dialogue.problem:
                break


def check_images(frames: list[Frame], max_pixels: int) -> None:
    """Decodes every labelled frame once; of byte-identical files the first is kept."""
    candidates = [frame for frame in frames if not frame.problem]
    first: dict[str, Frame] = {}
    inspections = inspect_images([frame.path for frame in candidates], Path.read_bytes, max_pixels)
    for frame, inspection in zip(candidates, inspections, strict=True):
        frame.sha256, frame.difference_hash = inspection.sha256, inspection.difference_hash
        if inspection.problem:
            frame.reject(*inspection.problem)
        elif frame.sha256 in first:
            frame.reject("duplicate_image", f"it is byte for byte {first[frame.sha256].image_id}")
        else:
            first[frame.sha256] = frame


def pass_problems_on(frames: list[Frame], labels: list[Label], dialogues: list[Dialogue]) -> None:
    """What hangs on a rejected thing is rejected too."""
    for frame in frames:
        if frame.label is None:
            frame.reject("unlabelled", "labels.csv does not name it")
        elif frame.label.problem:
            frame.reject("label_rejected", f"{frame.label.file}:{frame.label.line} {frame.label.problem[0]}")
    for item in [*labels, *dialogues]:
        if item.frame and item.frame.problem:
            item.reject("frame_rejected", f"{item.frame.image_id}: {item.frame.problem[0]}")


def settle(ledger: Ledger, kind: str, items: Iterable[Item]) -> None:
    for item in items:
        ledger.read(kind)
        if item.problem:
            ledger.reject(kind, item.file, item.line, *item.problem)
        else:
            ledger.accept(kind)
