"""Turn conversations that exist already, with or without images, into the dataset that training opens.

    python data_prep/prepare_conversations.py --input llava_data.json --images images --output data/conversations

--input is a file, a folder or a Hub name; each record is recognised by its own keys:

    conversations   [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]: LLaVA JSON, ShareGPT
    messages        [{"role": "user", "content": "..."}]; content as text, or typed parts (vsft, Qwen, OpenAI): JSONL, Hub
    question and answer   one turn each: CSV with columns of these names

`image` or `images`, keys called alike (image_path, file_name, ...) or the marks themselves (<img>a.jpg</img>) name the
pictures inside --images, or hold them; a record without is text only. Marks (<image>, those of other tools, parts of type
image) must be as many as the pictures; each picture is shown at the start of the user turn that holds its mark. Plain
messages and CSV may leave the marks out: the first user turn shows the pictures then. `system` and its like become a system
turn; a turn marked with weight: 0, loss: false or their like is read, not learnt. What cannot be obeyed is rejected (video,
tools, preferences), and keys that are not used are counted. Every record ends up accepted, or in rejects.csv with a reason.
Records that share an image, or have almost the same one, go to the same split, and with --group_by those of one folder,
camera, clip or day.

How answers are scored is read off them; --task says it (one of count, yes_no, choice, short_answer, number, free_text, or
the key that holds it), and --answers names the key that holds several right answers (texts, or VQA's {"answer": ...}).
"""

import argparse
import functools
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from preparing import Parser, command
from preparing.conversations import (
    IMAGES_FEATURE,
    MESSAGES_FEATURE,
    RESERVED_COLUMNS,
    WEIGHTED_MESSAGES_FEATURE,
    is_empty,
    plain_key,
)
from preparing.dataset_writer import Picture, describe_file, refuse_existing_output, summarise, write_dataset
from preparing.images import (
    Inspection,
    Seen,
    add_image_flags,
    describe_leaks,
    find_inside,
    image_flag_problems,
    inspect_images,
    near_duplicates,
    report_leaks,
    stack_hashes,
)
from preparing.ledger import Ledger
from preparing.record_keys import (
    CONVERSATION_KEYS,
    TASK_NAMES,
    name_pictures,
    obey_other_keys,
    read_conversation_of,
    same_pictures,
    say_problem,
    unfilled_placeholder,
)
from preparing.splits import connected_groups, split_groups
from preparing.tables import read_table
from preparing.text_files import RepeatedKeys, json_items, keep_repeated, read_text

# isort: split
from finetuning.data.picture_table import PICTURES, StoredImage, with_stored_pictures  # preparing finds it

SCORING_FEATURES = {"task": datasets.Value("string"), "answers": datasets.List(datasets.Value("string"))}
FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
# Keys whose names in braces or brackets are words of a text more often than they are placeholders.
COMMON_KEYS = {
    "id",
    "image",
    "images",
    "text",
    "question",
    "answer",
    "messages",
    "conversations",
    "source",
    "model",
    "type",
}
COLUMN_TYPES = ("string", "int64", "float64")


@dataclass(frozen=True)
class FileImage:
    """An image that a record names: a path inside the images folder."""

    name: str
    folder: Path

    def read(self) -> bytes:
        """The picture's bytes, as they were found."""
        return (self.folder / self.name).read_bytes()


@dataclass(frozen=True)
class GivenImage:
    """An image whose bytes a record itself holds, as base64 or in an object."""

    name: str
    data: bytes = field(repr=False)

    def read(self) -> bytes:
        """The picture's bytes, as they were found."""
        return self.data


@dataclass(frozen=True)
class HeldImage:
    """An image that lies in a dataset itself: its row, and its place among the row's images."""

    name: str
    dataset: "HeldImages" = field(repr=False, compare=False)
    row: int
    place: int

    def read(self) -> bytes:
        """The picture's bytes, as they were found."""
        return self.dataset.read(self.row, self.place)


@dataclass(frozen=True, eq=False)
class HeldImages:
    rows: datasets.Dataset  # with images undecoded, {"bytes", "path"}
    column: str

    def read(self, row: int, place: int) -> bytes:
        """The picture's bytes, as they were found."""
        held = self.rows[row][self.column]
        image = held[place] if isinstance(held, list) else held
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


InputImage = FileImage | GivenImage | HeldImage


@dataclass(eq=False, slots=True)  # there may be a million
class Record:
    """One conversation of the input, with what is wrong with it."""

    file: str
    line: int  # line of a text file; number of the row, from 1, of a dataset
    raw: Any
    images: list[InputImage] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    image_id: str = ""
    number: int = 0  # of the record in its input, from 1: a JSON file may hold all of them in one line
    task: str | None = None
    answers: list[str] | None = None
    problem: tuple[str, str] | None = None

    def forget(self, kept: Collection[str | None]) -> None:
        """Hold no longer what was read of the record, but for the values of `kept`; its keys stay, to be named."""
        if isinstance(self.raw, Mapping):
            self.raw = {sys.intern(key): value if key in kept else None for key, value in self.raw.items()}

    def reject(self, reason: str, detail: str) -> None:
        """Note why the record is left out; the first reason stays."""
        self.problem = self.problem or (reason, detail)


def read_records(source: str, split: str) -> tuple[Iterable[Record], list[dict[str, Any]], HeldImages | None]:
    """(records, sources for the manifest, the images that the input itself holds) of a file, folder or Hub name."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() in FILE_SUFFIXES:
        readers = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv}
        return readers[path.suffix.lower()](path), [describe_file(path)], None
    dataset = open_dataset(source, split)
    inner = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
    if unread := [name for name, feature in inner.items() if isinstance(feature, (datasets.Audio, datasets.Video))]:
        raise ValueError(f"{source} holds video or audio in {', '.join(unread)}: pictures and text are learnt only")
    with_images = [name for name, feature in inner.items() if isinstance(feature, datasets.Image)]
    if len(with_images) > 1:
        raise ValueError(
            f"{source} holds images in {', '.join(with_images)}: leave the column that is meant, and no other"
        )
    images = None
    for name in with_images:
        undecoded = datasets.Image(decode=False)
        in_lists = isinstance(dataset.features[name], datasets.List)
        if not isinstance(inner[name], StoredImage):
            dataset = dataset.cast_column(name, datasets.List(undecoded) if in_lists else undecoded)
        images = HeldImages(dataset, name)
    text_only = dataset.remove_columns(images.column) if images else dataset
    records = [Record(source, number, raw) for number, raw in enumerate(text_only, start=1)]
    # The library's fingerprint changes with the data; file hashes would not describe a Hub dataset.
    return (
        records,
        [{"path": source, "split": split, "rows": len(records), "fingerprint": dataset._fingerprint}],
        images,
    )


def open_dataset(source: str, split: str) -> datasets.Dataset:
    """One split of a saved dataset or a Hub dataset. Raises ValueError where there is no such split."""
    path = Path(source)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        opened = datasets.load_from_disk(source)
        dataset = opened if isinstance(opened, datasets.Dataset) else opened.get(split)
        if dataset is None:
            raise ValueError(f"{source} has the splits {', '.join(opened)}, not {split!r}: name one with --input_split")
        return with_stored_pictures(dataset, path) if (path / PICTURES).is_dir() else dataset
    if not path.is_dir() and (
        path.exists() or path.suffix.lower() in FILE_SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    ):
        raise ValueError(
            f"--input {source} is no file of {' '.join(FILE_SUFFIXES)}, no folder, and no Hub name such as owner/dataset"
        )
    try:
        return datasets.load_dataset(source, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"--input {source} could not be opened as a dataset, split {split!r}: {error}") from error


def read_json(path: Path) -> Iterator[Record]:
    """Records of a JSON list, each with the line that it begins in."""
    for line, raw in json_items(path, read_text(path)):
        yield Record(str(path), line, raw)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of JSON Lines; a line that is not JSON is a record with a problem."""
    for line, text in enumerate(lines_of(read_text(path)), start=1):
        if text.strip():
            try:
                yield Record(str(path), line, json.loads(text, object_pairs_hook=keep_repeated))
            except json.JSONDecodeError as error:
                yield Record(str(path), line, None, problem=("not_json", f"{error.msg} at column {error.colno}"))


def lines_of(text: str) -> Iterator[str]:
    """Its lines, one after the other: a list of a million would hold the text twice."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def read_csv(path: Path) -> Iterator[Record]:
    """Records of a table. Raises ValueError where its header has neither question and answer nor a conversation."""
    table = read_table(path)
    header = [name.lower() if name.lower() in ("question", "answer") else name for name in table.header]
    if not {"question", "answer"} <= set(header) and not {plain_key(name) for name in header} & set(CONVERSATION_KEYS):
        missing = " and ".join(sorted({"question", "answer"} - set(header)))
        raise ValueError(f"{path} has the columns {', '.join(header) or '(none)'}; {missing} missing")
    if "" in header or len(set(header)) < len(header):
        raise ValueError(f"{path} has the columns {', '.join(header)}: expected each to have a name of its own")
    for line, cells in table.rows:
        record = Record(str(path), line, dict(zip(header, cells, strict=False)))
        if len(cells) != len(header):
            record.reject("wrong_number_of_cells", f"{len(cells)} cells under {len(header)} columns")
        yield record


def read_conversations(
    records: Iterable[Record], args: argparse.Namespace, held: HeldImages | None, kept: Collection[str]
) -> Iterator[Record]:
    """Number the records, fill in their messages and images, and let go of what else was read of each."""
    for number, record in enumerate(records, start=1):
        record.number = number
        fill_in_answer(record, args.answers)
        read_conversation(record, args.images, held, kept)
        record.forget({*kept, args.group_by})
        yield record


def read_conversation(record: Record, folder: Path | None, held: HeldImages | None, kept: Iterable[str]) -> None:
    """Fills in messages and images from the raw record, or its problem."""
    if record.problem:
        return
    raw = record.raw
    if not isinstance(raw, Mapping):
        return record.reject("not_an_object", f"expected an object, got {raw!r:.80}")
    if isinstance(raw, RepeatedKeys):
        return record.reject(
            "repeated_key", f"{', '.join(raw.names)} stands twice in one object: leave the one that is meant"
        )
    try:
        turns, marks_may_be_left_out, used = read_conversation_of(raw)
        if turns is None:
            keys = ", ".join(map(str, raw))
            expected = "expected conversations, messages, or question and answer"
            return record.reject("unknown_form", f"{expected}; got {keys:.120}")
        if turns.problems:
            return record.reject(turns.problems[0][0], "; ".join(detail for _, detail in turns.problems))
        record.messages = turns.messages
        obey_other_keys(raw, record.messages, used, kept)
        in_keys = [] if held else name_pictures(raw, used)
        find_images(record, in_keys, turns.pictures, folder, held)
        if record.problem:
            return
        num_marks = turns.num_image_marks
        if num_marks != len(record.images) and not (marks_may_be_left_out and num_marks == 0):
            return record.reject("image_mark_count", f"{num_marks} image marks, but {len(record.images)} images")
        names = {*raw, *kept} - COMMON_KEYS | ({"count"} if record.images else set())
        if found := unfilled_placeholder(record.messages, names):
            return record.reject("unfilled_placeholder", f"{found} stands in the text, and would be taught as words")
    except ValueError as error:
        return record.reject(*say_problem(error))
    others = [key for key in raw if key not in used and key not in kept]
    # An empty cell says nothing; that of pandas (NaN) is the one value that differs from itself.
    unused = [str(key) for key in others if raw[key] not in (None, "") and raw[key] == raw[key]]
    record.unused = [*unused, *turns.unused]


def find_images(
    record: Record,
    in_keys: list[str | bytes],
    in_text: Sequence[str | bytes | None],
    folder: Path | None,
    held: HeldImages | None,
) -> None:
    """The images of a record: those that its dataset holds, its keys name, or its marks name."""
    if held:
        images = held.rows[record.line - 1][held.column]
        for place, image in enumerate(images if isinstance(images, list) else [images] if images else []):
            name = Path(image["path"] or "image").name
            record.images.append(HeldImage(f"{record.line}-{place + 1}-{name}", held, record.line - 1, place))
    named = [picture for picture in in_text if picture is not None]
    if named and len(named) < len(in_text):
        detail = f"{len(named)} of its {len(in_text)} image marks name a picture: name each, or none"
        return record.reject("image_mark_count", detail)
    if named and held:
        return record.reject("two_pictures", f"{named[0]!r:.60} is named, but the dataset holds the images itself")
    if named and in_keys and not same_pictures(named, in_keys):
        return record.reject("two_pictures", f"its marks name {named[0]!r:.60}, its keys {in_keys[0]!r:.60}")
    for place, picture in enumerate(in_keys or named, start=1):
        if isinstance(picture, bytes):
            record.images.append(GivenImage(f"{record.number}-{place}-image", picture))
            continue
        if folder is None:
            return record.reject("no_images_folder", f"it names {picture!r:.80}, but no --images folder was given")
        found = find_file(picture, folder)
        if isinstance(found, tuple):
            return record.reject(*found)
        record.images.append(found)


@functools.cache  # many records show one image
def find_file(name: str, folder: Path) -> FileImage | tuple[str, str]:
    """The picture of that name inside `folder`, or why it is not read: (reason, detail)."""
    path = find_inside(name, folder)
    if isinstance(path, tuple):
        return path
    # Resolved, so that a/../b.jpg and b.jpg are known to be one image.
    return FileImage(path.resolve().relative_to(folder.resolve()).as_posix(), folder)


def read_image(image: InputImage) -> bytes:
    """The picture's bytes, for a pool of processes."""
    return image.read()


def check_images(records: list[Record], max_pixels: int) -> dict[InputImage, Inspection]:
    """Decodes every image once, however many records show it; returns the sound ones."""
    images = list(dict.fromkeys(image for record in records if not record.problem for image in record.images))
    inspections = dict(zip(images, inspect_images(images, read_image, max_pixels), strict=True))
    for record in records:
        for image in record.images if not record.problem else []:
            if problem := inspections[image].problem:
                record.reject(problem[0], f"{image.name}: {problem[1]}")
    return {image: inspection for image, inspection in inspections.items() if not inspection.problem}


def check_duplicates(records: list[Record], inspections: dict[InputImage, Inspection]) -> None:
    """Reject records whose pictures and words are those of an earlier one."""
    first: dict[bytes, Record] = {}
    for record in records:
        if record.problem:
            continue
        pictures = tuple(inspections[image].sha256 for image in record.images)
        words = tuple((message["role"], message["content"], message.get("weight", 1)) for message in record.messages)
        digest = hashlib.sha256(repr((pictures, words)).encode("utf-8", "surrogatepass")).digest()
        if twin := first.get(digest):
            record.reject("duplicate", f"same images and words as record {twin.number}, line {twin.line}")
        first.setdefault(digest, record)


def read_columns(records: list[Record], columns: dict[str, str]) -> None:
    """Turns the values of --columns into their types; CSV holds them as text, and pandas writes 7 as 7.0."""
    for record in records:
        for name, type_name in columns.items() if not record.problem else []:
            try:
                record.raw[name] = read_value(record.raw.get(name), type_name)
            except (ValueError, TypeError, OverflowError):
                record.reject("bad_value", f"{name} is {record.raw.get(name)!r:.40}, expected {type_name}")


def read_value(value: Any, type_name: str) -> str | int | float:
    """A cell in its column's type. Raises TypeError or ValueError where it does not fit."""
    if type_name == "string":
        if not isinstance(value, str):
            raise TypeError
        return value
    number = float(value)
    if isinstance(value, bool) or (type_name == "int64" and number != int(number)):
        raise ValueError
    return int(number) if type_name == "int64" else number


def group_records(
    records: list[Record], inspections: dict[InputImage, Inspection], max_bits: int, group_by: str | None
) -> list[list[Record]]:
    """Records that share an image, have near-duplicate images, or are of one folder or one value of a key, in one group.

    `image_id` names the first image.
    """
    images = list(inspections)
    number_of = {image: number for number, image in enumerate(images)}
    hashes = stack_hashes([inspections[image].difference_hash for image in images]) if images else []
    pairs = (
        [(left, right) for block in near_duplicates(hashes, hashes, max_bits) for left, right, _ in block.tolist()]
        if images
        else []
    )
    # Records are nodes after the images, tied to each image they show.
    for place, record in enumerate(records):
        record.image_id = record.images[0].name if record.images else f"text-{record.number}"
        pairs += [(len(images) + place, number_of[image]) for image in record.images]
    first_of: dict[str, int] = {}
    for place, record in enumerate(records) if group_by else ():
        group = str(Path(record.image_id).parent) if group_by == "folder" else str(record.raw[group_by])
        pairs.append((len(images) + place, len(images) + first_of.setdefault(group, place)))
    groups = [
        [records[node - len(images)] for node in group if node >= len(images)]
        for group in connected_groups(len(images) + len(records), [np.array(pairs, dtype=np.int64).reshape(-1, 2)])
    ]
    return [group for group in groups if group]


def check_groups(records: list[Record], group_by: str | None) -> None:
    """Every record must say which camera, clip or day it is of."""
    for record in records if group_by else ():
        if record.problem:
            continue
        if group_by == "folder" and not record.images:
            record.reject("no_group", "it has no image, so that --group_by folder cannot place it")
        elif group_by != "folder" and is_empty(record.raw.get(group_by)):
            record.reject(
                "no_group", f"it has no {group_by}, which --group_by needs; its keys: {', '.join(record.raw)}"
            )


def fill_in_answer(record: Record, answers: str | None) -> None:
    """A question without an answer of its own is taught the commonest of its right answers, of equals the first."""
    raw = record.raw
    if record.problem or answers is None or not isinstance(raw, Mapping) or "question" not in raw or "answer" in raw:
        return
    given = raw.get(answers)
    if isinstance(given, list) and given and not any(key in raw for key in ("messages", "conversations")):
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in given]
        record.raw = {**raw, "answer": Counter(map(str, texts)).most_common(1)[0][0]}


def read_scoring(record: Record, task: str | None, answers: str | None) -> None:
    """The columns `task` and `answers` of a record, or its problem."""
    if record.problem:
        return
    if task is not None:
        record.task = task if task in TASK_NAMES else record.raw.get(task)
        if record.task is not None and record.task not in TASK_NAMES:
            return record.reject("bad_task", f"{task} is {record.task!r:.40}, expected one of {', '.join(TASK_NAMES)}")
    if answers is not None and (given := record.raw.get(answers)) is not None:
        given = given if isinstance(given, list) else [given]
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in given]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            return record.reject("bad_answers", f"{answers} is {given!r:.60}, expected texts")
        record.answers = texts


def make_row(
    record: Record,
    columns: dict[str, str],
    scoring: Collection[str],
    inspections: Mapping[InputImage, Inspection],
    has_images: bool,
    has_weights: bool,
) -> dict[str, Any]:
    """A row of the dataset; pictures as their own bytes, weights of turns where any record has them."""
    messages = [{"weight": 1} | message for message in record.messages] if has_weights else record.messages
    row = {"messages": messages, "image_id": record.image_id, **{name: record.raw[name] for name in columns}}
    row |= {name: getattr(record, name) for name in ("task", "answers") if name in scoring}
    if has_images:
        row["images"] = [
            Picture(inspections[image].sha256, Path(image.name).name, image.read) for image in record.images
        ]
    return row


def parse_arguments() -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = Parser(__doc__)
    parser.add_argument("--input", required=True, help="file (.json .jsonl .csv), folder or Hub name")
    parser.add_argument("--input_split", default="train", help="split of a folder or Hub dataset (default %(default)s)")
    parser.add_argument("--images", type=Path, help="folder that the names of images are looked up in")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME:TYPE",
        help=f"columns to keep as ground truth, as in count:int64; types: {', '.join(COLUMN_TYPES)}",
    )
    parser.add_argument("--task", help=f"how answers are scored: {', '.join(TASK_NAMES)}; or a key that says so")
    parser.add_argument("--answers", help="key of several right answers, such as the ten of VQA")
    parser.add_argument(
        "--group_by", help="records that stay in one split: folder (of the image), or a key such as camera, clip or day"
    )
    parser.add_argument("--validation_size", type=float, default=0.1, help="share of the records (default %(default)s)")
    parser.add_argument("--test_size", type=float, default=0.1, help="share of the records (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for the split (default %(default)s)")
    add_image_flags(parser)
    args = parser.parse_args()
    problems = []
    if args.images is not None and not args.images.is_dir():
        problems.append(f"--images {args.images} is not a folder")
    if min(args.validation_size, args.test_size) < 0 or args.validation_size + args.test_size >= 1:
        problems.append(
            f"--validation_size {args.validation_size} and --test_size {args.test_size}: expected shares that leave some to train"
        )
    problems += image_flag_problems(args)
    for column in args.columns:
        name, _, type_name = column.partition(":")
        if type_name not in COLUMN_TYPES or name in ("", *RESERVED_COLUMNS):
            problems.append(
                f"--columns {column}: expected a column's name and one of {', '.join(COLUMN_TYPES)}: count:int64"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return args


def note_records(records: list[Record]) -> Ledger:
    """Every record as accepted or rejected; where a line holds several, the detail begins with the record's number."""
    ledger = Ledger()
    records_of_line = Counter(record.line for record in records)
    for record in records:
        ledger.read("records")
        if record.problem:
            reason, detail = record.problem
            where = f"record {record.number}: " if records_of_line[record.line] > 1 else ""
            ledger.reject("records", record.file, record.line, reason, where + detail)
        else:
            ledger.accept("records")
    return ledger


def main() -> None:
    """Records and pictures -> dataset, manifest and ledger; a mistake ends it with one message."""
    args = parse_arguments()
    refuse_existing_output(args.output)
    columns = dict(column.split(":") for column in args.columns)

    # Read.
    read, sources, held = read_records(args.input, args.input_split)

    # Check.
    # The columns of scoring, and the keys that they are read from.
    scoring = {name: feature for name, feature in SCORING_FEATURES.items() if getattr(args, name) is not None}
    kept = {*columns, *(getattr(args, name) for name in scoring)}
    records = list(read_conversations(read, args, held, kept))
    inspections = check_images(records, args.max_pixels)
    check_duplicates(records, inspections)
    read_columns(records, columns)
    for record in records:
        read_scoring(record, args.task, args.answers)
    check_groups(records, args.group_by)
    ledger = note_records(records)
    accepted = [record for record in records if not record.problem]

    # Split.
    splits, leaks = {}, {"between": {}}
    if accepted:
        groups = group_records(accepted, inspections, args.near_duplicate_bits, args.group_by)
        splits = split_groups(groups, args.validation_size, args.test_size, args.seed)
        seen = {
            name: [
                Seen(image.name, None, 0, inspections[image].difference_hash)
                for image in dict.fromkeys(image for record in of_split for image in record.images)
            ]
            for name, of_split in splits.items()
        }
        leaks = report_leaks(seen, args.near_duplicate_bits)

    # Write.
    has_images = any(record.images for record in accepted)
    has_weights = any("weight" in message for record in accepted for message in record.messages)
    unused = Counter(key for record in accepted for key in record.unused if key != args.group_by)
    features = datasets.Features(
        {
            "messages": WEIGHTED_MESSAGES_FEATURE if has_weights else MESSAGES_FEATURE,
            # Training takes any dataset with images for one of a vision model, so a text-only one has no such column.
            **({"images": IMAGES_FEATURE} if has_images else {}),
            "image_id": datasets.Value("string"),
            **{name: datasets.Value(type_name) for name, type_name in columns.items()},
            **scoring,
        }
    )
    write_dataset(
        args.output,
        splits,
        features,
        ledger=ledger,
        sources=sources,
        arguments=vars(args),
        split_rule="groups of records with the same or almost the same image"
        + (f" or the same {args.group_by}" if args.group_by else "")
        + f", shuffled with seed {args.seed}",
        make_row=functools.partial(
            make_row,
            columns=columns,
            scoring=scoring,
            inspections=inspections,
            has_images=has_images,
            has_weights=has_weights,
        ),
        unused_keys=dict(unused.most_common()),
        leak_report=leaks,
    )
    print(summarise(args.output, ledger, {name: len(of_split) for name, of_split in splits.items()}))
    if unused:
        print("keys not used: " + ", ".join(f"{key} x {number:,}" for key, number in unused.most_common()))
    if leaks["between"]:
        print(describe_leaks(leaks))


if __name__ == "__main__":
    command.run(main)
