"""Turn CCTV frames, their head counts and question templates into the dataset that training opens.

    python data_prep/prepare_cctv.py --frames data/raw-sample/frames --labels data/raw-sample/labels.csv \
        --messages data/raw-sample/messages.txt --output data/cctv

labels.csv   first column: frame number or file name (1 is seq_000001.jpg); a column `count`; others as you like.
messages.txt dialogues, each a blank line apart: turns `USER:` / `ASSISTANT:` or `사용자:` / `어시스턴트:`, in which {count}
             or any other column of labels.csv in braces is filled in. A line `IMAGE: seq_000001.jpg` (`이미지:`) ties a
             dialogue to one frame. Or JSON: {"messages": [{"role": ..., "content": ...}], "image": ...}, or a list.

Every frame, label and dialogue ends up accepted, or in rejects.csv with a reason. Splits are blocks of time with a gap
between them, because neighbouring frames of a video are near-copies; the other rules are

    --split ordered --train 800   the first 800 frames to train, all others to test: the published mall protocol
    --split random                for comparison; the leak report shows what it lets through

1,000 frames of 640x480 take 7 s on 2 cores.
"""

import argparse
import functools
import hashlib
import os
import random
import re
import string
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from preparing.conversations import IMAGES_FEATURE, MESSAGES_FEATURE, read_turns
from preparing.images import (
    MAX_PIXELS,
    NEAR_DUPLICATE_BITS,
    SUFFIXES,
    Seen,
    describe_leaks,
    inspect_images,
    is_inside,
    report_leaks,
)
from preparing.ledger import Ledger
from preparing.reading import csv_rows, json_items, normalise_name, read_text
from preparing.splits import split_groups, split_in_order, split_into_blocks
from preparing.writing import describe_file, refuse_existing_output, summarise, write_dataset

# Data preparation imports nothing else of training: a label must be read by the very function that scores answers.
sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from finetuning.counting import parse_count

CONTRACT_COLUMNS = ("messages", "images", "image_id")
# Frames on each side of a cut that are left out. On the mall frames, labels 1 frame apart differ by 1.7 people, 10
# apart by 5.2, 100 apart by 7.5, and frames 10 apart look as different as frames 300 apart.
GAP = 10
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
    if taken := [name for name in header[1:] if name in CONTRACT_COLUMNS]:
        problems.append(f"{', '.join(taken)}: the dataset has a column of that name already, choose another")
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
        for frame in frames:
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
        if not is_inside(self.folder / key.strip(), self.folder):
            return "outside_folder", f"{key!r} lies outside {self.folder}"
        return "missing_frame", f"{key!r} fits no file in {self.folder}"


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
        images = item.get("images") or []
        image = item.get("image", images[0] if isinstance(images, list) and len(images) == 1 else images or None)
        yield line, item.get("messages"), image


def read_plain(text: str) -> Iterator[tuple[int, Any, str | None]]:
    """(line, turns, image or None) of each block between blank lines. A line that opens no turn continues the last."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1)]
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
    needed = set().union(*(names for dialogue in dialogues if not dialogue.image for names in dialogue.fields))
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
                answer = message["content"].format_map(label.values)
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


def split_frames(frames: list[Frame], args: argparse.Namespace) -> tuple[dict[str, list[Frame]], str]:
    """(frames of each split, the rule in words). Frames in a gap are rejected as such."""
    if args.split == "ordered":
        splits, in_gap = split_in_order(frames, args.train, args.validation, args.gap)
        rule = f"ordered: first {args.train} frames to learn from, all later ones to test; validation is the last "
        rule += f"{args.validation} of the first {args.train}, after a gap of {args.gap if args.validation else 0}"
    elif args.split == "random":
        groups = [[frame] for frame in frames]
        splits, in_gap = split_groups(groups, args.validation_size, args.test_size, args.seed), []
        rule = f"random frames, seed {args.seed}: neighbouring frames fall on both sides"
    else:
        splits, in_gap = {"train": [], "validation": [], "test": []}, []
        for video in dict.fromkeys(frame.video for frame in frames):
            of_video = [frame for frame in frames if frame.video == video]
            blocks, gap = split_into_blocks(of_video, args.validation_size, args.test_size, args.gap)
            in_gap += gap
            for name, block in blocks.items():
                splits[name] += block
        rule = f"blocks of time in each folder: train, then validation, then test, {args.gap} frames left out between"
    for frame in in_gap:
        frame.reject("split_gap", "left out between two splits, because it looks like frames on both sides")
    return splits, rule


def choose_rows(
    splits: dict[str, list[Frame]], dialogues: list[Dialogue], questions_per_frame: int | None, seed: int
) -> dict[str, list[tuple[Frame, Dialogue]]]:
    """For each frame its own dialogues and `questions_per_frame` (None: all) of those that fit any frame."""
    usable = [dialogue for dialogue in dialogues if not dialogue.problem]
    for_any = [dialogue for dialogue in usable if not dialogue.frame]
    own: dict[int, list[Dialogue]] = {}
    for dialogue in usable:
        if dialogue.frame:
            own.setdefault(id(dialogue.frame), []).append(dialogue)
    if questions_per_frame is not None and for_any and questions_per_frame > len(for_any):
        raise ValueError(
            f"--questions_per_frame {questions_per_frame}, but only {len(for_any)} accepted dialogues fit any frame: "
            f"write more, or use --questions_per_frame all"
        )
    number = len(for_any) if questions_per_frame is None else min(questions_per_frame, len(for_any))
    rows: dict[str, list[tuple[Frame, Dialogue]]] = {}
    for name, frames in splits.items():
        rows[name] = []
        for frame in frames:
            # Seeded by the frame too, so that the choice for one frame does not hang on what other frames there are.
            drawn = random.Random(f"{seed} {frame.image_id}").sample(for_any, number)
            chosen = [*own.get(id(frame), []), *drawn]
            if not chosen:
                frame.reject("no_dialogue", "no accepted dialogue is for this frame or for any frame")
            rows[name] += [(frame, dialogue) for dialogue in chosen]
    return rows


def settle(ledger: Ledger, kind: str, items: Iterable[Item]) -> None:
    for item in items:
        ledger.read(kind)
        if item.problem:
            ledger.reject(kind, item.file, item.line, *item.problem)
        else:
            ledger.accept(kind)


def make_row(pair: tuple[Frame, Dialogue], extra_columns: list[str]) -> dict[str, Any]:
    frame, dialogue = pair
    values = frame.label.values
    return {
        "messages": [
            {"role": message["role"], "content": message["content"].format_map(values)} for message in dialogue.messages
        ],
        # The file's own bytes: nothing is encoded a second time.
        "images": [{"bytes": frame.path.read_bytes(), "path": frame.path.name}],
        "image_id": frame.image_id,
        "count": frame.label.count,
        **{name: values[name] for name in extra_columns},
    }


def describe_folder(folder: Path, frames: list[Frame]) -> dict[str, Any]:
    """One hash for all frames that were decoded: SHA-256 over the lines `sha256  image_id`, as sha256sum prints them."""
    lines = [f"{frame.sha256}  {frame.image_id}\n" for frame in frames if frame.sha256]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return {"path": str(folder), "files": len(lines), "sha256": digest}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--frames", type=Path, required=True, help="folder of images, one subfolder per video if several"
    )
    parser.add_argument("--labels", type=Path, required=True, help="labels.csv")
    parser.add_argument("--messages", type=Path, required=True, help="messages.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--questions_per_frame", default="1", help="dialogues drawn for each frame, or all (default %(default)s)"
    )
    parser.add_argument(
        "--split", choices=["blocks", "ordered", "random"], default="blocks", help="default %(default)s"
    )
    parser.add_argument("--validation_size", type=float, help="share of the frames, blocks and random (default 0.1)")
    parser.add_argument("--test_size", type=float, help="share of the frames, blocks and random (default 0.2)")
    parser.add_argument("--train", type=int, help="frames to learn from, ordered")
    parser.add_argument("--validation", type=int, help="of them the last so many to validate, ordered (default 0)")
    parser.add_argument("--gap", type=int, help=f"frames left out between splits, blocks and ordered (default {GAP})")
    parser.add_argument("--seed", type=int, default=0, help="for drawing dialogues and the random split (default 0)")
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="larger images are rejected (default 50 million)"
    )
    parser.add_argument(
        "--near_duplicate_bits",
        type=int,
        default=NEAR_DUPLICATE_BITS,
        help="differing bits of 256 up to which two frames are near-duplicates (default %(default)s)",
    )
    args = parser.parse_args()
    problems = []
    if not args.frames.is_dir():
        problems.append(f"--frames {args.frames} is not a folder")
    problems += [
        f"--{name} {path} is not a file"
        for name, path in (("labels", args.labels), ("messages", args.messages))
        if not path.is_file()
    ]
    reads = {
        "blocks": {"validation_size": 0.1, "test_size": 0.2, "gap": GAP},
        "random": {"validation_size": 0.1, "test_size": 0.2},
        "ordered": {"train": None, "validation": 0, "gap": GAP},
    }
    for name in ("validation_size", "test_size", "train", "validation", "gap"):
        if name not in reads[args.split]:
            if getattr(args, name) is not None:
                problems.append(f"--{name} means nothing with --split {args.split}: leave it out")
        elif getattr(args, name) is None:
            setattr(args, name, reads[args.split][name])
    if args.split == "ordered" and args.train is None:
        problems.append("--split ordered needs --train: how many frames to learn from")
    for name in ("train", "validation", "gap", "near_duplicate_bits"):
        if (getattr(args, name) or 0) < 0:
            problems.append(f"--{name} {getattr(args, name)}: expected 0 or more")
    if args.max_pixels < 1:
        problems.append(f"--max_pixels {args.max_pixels}: expected 1 or more")
    shares = [args.validation_size or 0, args.test_size or 0]
    if min(shares) < 0 or sum(shares) >= 1:
        problems.append(
            f"--validation_size {shares[0]} and --test_size {shares[1]}: expected shares that leave some to train"
        )
    if args.questions_per_frame != "all" and not re.fullmatch(r"[1-9]\d{0,8}", args.questions_per_frame, re.ASCII):
        problems.append(f"--questions_per_frame {args.questions_per_frame}: expected 1, 2, ... or all")
    if problems:
        raise ValueError("\n".join(problems))
    return args


def main() -> None:
    args = parse_arguments()
    refuse_existing_output(args.output)

    # Read.
    labels, columns = read_labels(args.labels)
    dialogues = read_dialogues(args.messages)
    frames = find_frames(args.frames)

    # Check: what belongs together, then each on its own, then against each other.
    index = FrameIndex(frames, args.frames)
    match_labels(labels, index)
    tie_dialogues(dialogues, index)
    check_templates(dialogues, columns)
    check_empty_cells(dialogues, labels)
    pass_problems_on(frames, labels, dialogues)
    check_images(frames, args.max_pixels)
    pass_problems_on(frames, labels, dialogues)
    accepted = [frame for frame in frames if not frame.problem]
    check_numbers(dialogues, accepted)

    # Split, and give every frame its dialogues.
    rule, rows, leaks = "nothing to split", {}, {}
    if accepted:
        splits, rule = split_frames(accepted, args)
        per_frame = None if args.questions_per_frame == "all" else int(args.questions_per_frame)
        pass_problems_on(frames, labels, dialogues)
        rows = choose_rows(splits, dialogues, per_frame, args.seed)
        pass_problems_on(frames, labels, dialogues)
        seen = {
            name: [Seen(frame.image_id, frame.video, frame.time, frame.difference_hash) for frame in of_split]
            for name, of_split in splits.items()
        }
        leaks = report_leaks(seen, args.near_duplicate_bits)

    # Write.
    ledger = Ledger()
    settle(ledger, "frames", frames)
    settle(ledger, "labels", labels)
    settle(ledger, "dialogues", dialogues)
    extra_columns = [name for name in columns if name != "count" and name not in CONTRACT_COLUMNS]
    features = datasets.Features(
        {
            "messages": MESSAGES_FEATURE,
            "images": IMAGES_FEATURE,
            "image_id": datasets.Value("string"),
            "count": datasets.Value("int64"),
            **{name: datasets.Value("string") for name in extra_columns},
        }
    )
    write_dataset(
        args.output,
        rows,
        features,
        ledger=ledger,
        sources=[describe_folder(args.frames, frames), describe_file(args.labels), describe_file(args.messages)],
        arguments=vars(args),
        split_rule=rule,
        make_row=functools.partial(make_row, extra_columns=extra_columns),
        frames={name: len({frame.image_id for frame, _ in pairs}) for name, pairs in rows.items()},
        leak_report=leaks,
    )
    print(summarise(args.output, ledger, {name: len(pairs) for name, pairs in rows.items()}))
    print(describe_leaks(leaks))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
