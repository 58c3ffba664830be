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
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from tqdm import tqdm

from preparing import Parser, command
from preparing.conversations import (
    IMAGES_FEATURE,
    MESSAGES_FEATURE,
    RESERVED_COLUMNS,
    WEIGHTED_MESSAGES_FEATURE,
    is_empty,
    plain_key,
)
from preparing.dataset_writer import (
    Picture,
    describe_file,
    refuse_existing_output,
    scratch_folder,
    summarise,
    write_dataset,
)
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
    resolved,
    resolved_folder,
    stack_hashes,
)
from preparing.kept_records import KeptRecords, KeptRows
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
from preparing.text_files import RepeatedKeys, json_items, keep_repeated, open_text

# isort: split
from finetuning.data.picture_table import PICTURES, StoredImage, with_stored_pictures  # preparing finds it
from finetuning.data.pictures import SUFFIXES

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
NAMES_A_FILE = re.compile("image|img|pic|photo|frame|file|이미지|사진|프레임|파일")
COLUMN_TYPES = ("string", "int64", "float64")


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image that a record names: a path inside the images folder."""

    name: str
    folder: Path

    def read(self) -> bytes:
        """The picture's bytes, as they were found."""
        return (self.folder / self.name).read_bytes()


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An image whose bytes a record itself holds, as base64 or in an object."""

    name: str
    data: bytes = field(repr=False)

    def read(self) -> bytes:
        """The picture's bytes, as they were found."""
        return self.data


@dataclass(frozen=True, slots=True)
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


@dataclass(eq=False, slots=True)
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
    records = (Record(source, number, raw) for number, raw in enumerate(text_only, start=1))
    # The library's fingerprint changes with the data; file hashes would not describe a Hub dataset.
    return (
        records,
        [{"path": source, "split": split, "rows": len(dataset), "fingerprint": dataset._fingerprint}],
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
    with open_text(path) as file:
        for line, raw in json_items(path, file):
            yield Record(str(path), line, raw)


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of JSON Lines; a line that is not JSON is a record with a problem."""
    with open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield Record(str(path), line, json.loads(text, object_pairs_hook=keep_repeated))
                except json.JSONDecodeError as error:
                    yield Record(str(path), line, None, problem=("not_json", f"{error.msg} at column {error.colno}"))


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


def keep_records(
    records: Iterable[Record],
    store: KeptRecords,
    args: argparse.Namespace,
    held: HeldImages | None,
    columns: dict[str, str],
    scoring: Collection[str],
) -> None:
    """Number the records, read and check each on its own, and hand them to the `store`."""
    kept = {*columns, *(getattr(args, name) for name in scoring)}
    for number, record in enumerate(tqdm(records, desc="reading records", unit="record"), start=1):
        record.number = number
        fill_in_answer(record, args.answers)
        read_conversation(record, args.images, held, kept)
        record.image_id = record.images[0].name if record.images else f"text-{number}"
        values = read_columns(record, columns)
        read_scoring(record, args.task, args.answers)
        group = read_group(record, args.group_by)
        values |= {name: getattr(record, name) for name in ("task", "answers") if name in scoring}
        store.add(record, values, group)
    store.finish()


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
        if folder and not record.images and (missed := picture_without_ending(raw, {*used, *kept}, folder)):
            return record.reject("missing_image", missed)
        names = {*raw, *kept} - COMMON_KEYS | ({"count"} if record.images else set())
        if found := unfilled_placeholder(record.messages, names):
            return record.reject("unfilled_placeholder", f"{found} stands in the text, and would be taught as words")
    except ValueError as error:
        return record.reject(*say_problem(error))
    others = [key for key in raw if key not in used and key not in kept]
    # An empty cell says nothing; that of pandas (NaN) is the one value that differs from itself.
    unused = [str(key) for key in others if raw[key] not in (None, "") and raw[key] == raw[key]]
    record.unused = [*unused, *turns.unused]


def picture_without_ending(raw: Mapping[str, Any], used: Collection[str], folder: Path) -> str | None:
    """Says which key of a record without pictures holds the name of one, without its ending; None where none does."""
    for key, value in raw.items():
        text = str(value).strip() if isinstance(value, (str, int)) else ""
        # A number counts records, unless the key says that it is a picture's.
        is_name = not text.isdecimal() or NAMES_A_FILE.search(plain_key(key))
        if key not in used and text and is_name and (found := stems_in(folder).get(text.replace("\\", "/"))):
            return f"{key} is {text!r:.80}, and {folder} has {found!r}: write the name with its ending"
    return None


@functools.cache
def stems_in(folder: Path) -> dict[str, str]:
    """The pictures below a folder by their names without ending, with and without the folders before them."""
    stems: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            name = path.relative_to(folder).as_posix()
            stems |= {name.rpartition(".")[0]: name, path.stem: name}
    return stems


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
    return FileImage(resolved(path).relative_to(resolved_folder(folder)).as_posix(), folder)


def read_image(image: InputImage) -> bytes:
    """The picture's bytes, for a pool of processes."""
    return image.read()


def check_images(store: KeptRecords, max_pixels: int) -> list[Inspection]:
    """Decodes every image once, however many records show it; rejects the records of unsound ones, and duplicates."""
    images = list(store.images)
    inspections = list(inspect_images(images, read_image, max_pixels))
    problems = {
        number: (problem[0], f"{image.name}: {problem[1]}")
        for number, (image, inspection) in enumerate(zip(images, inspections, strict=True))
        if (problem := inspection.problem)
    }
    store.reject_with_pictures(problems)
    store.reject_duplicates([inspection.sha256 for inspection in inspections])
    return inspections


def read_columns(record: Record, columns: dict[str, str]) -> dict[str, str | int | float]:
    """The values of --columns in their types; CSV holds them as text, and pandas writes 7 as 7.0."""
    values = {}
    for name, type_name in columns.items() if not record.problem else []:
        try:
            values[name] = read_value(record.raw.get(name), type_name)
        except (ValueError, TypeError, OverflowError):
            record.reject("bad_value", f"{name} is {record.raw.get(name)!r:.40}, expected {type_name}")
    return values


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


def group_records(store: KeptRecords, inspections: list[Inspection], max_bits: int) -> list[list[int]]:
    """Places of accepted records that share an image, have near-duplicate images, or are of one group, together."""
    sound = np.array(
        [number for number, inspection in enumerate(inspections) if not inspection.problem], dtype=np.int64
    )
    hashes = stack_hashes([inspections[number].difference_hash for number in sound]) if len(sound) else None
    alike = near_duplicates(hashes, hashes, max_bits) if hashes is not None else ()
    places = np.flatnonzero(store.is_accepted)
    pairs = itertools.chain(
        (sound[block[:, :2]] for block in alike), store.pairs_of_groups(places, num_images=len(inspections))
    )
    groups = [
        [int(places[node - len(inspections)]) for node in group if node >= len(inspections)]
        for group in connected_groups(len(inspections) + len(places), pairs)
    ]
    return [group for group in groups if group]


def read_group(record: Record, group_by: str | None) -> str | None:
    """Which camera, clip or day a record is of: every one must say so."""
    if record.problem or group_by is None:
        return None
    if group_by == "folder":
        if not record.images:
            record.reject("no_group", "it has no image, so that --group_by folder cannot place it")
        return str(Path(record.image_id).parent)
    if is_empty(record.raw.get(group_by)):
        detail = f"it has no {group_by}, which --group_by needs; its keys: {', '.join(record.raw)}"
        record.reject("no_group", detail)
    return str(record.raw.get(group_by))


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


def refuse_text_alone(store: KeptRecords, folder: Path | None) -> None:
    """Raises ValueError where a folder of pictures is given and no record shows one, though their keys speak of pictures."""
    if folder is None or shows_pictures(store) or not store.is_accepted.any():
        return
    unused = store.count_unused(np.flatnonzero(store.is_accepted))
    if keys := [key for key in unused if NAMES_A_FILE.search(plain_key(key))]:
        raise ValueError(
            f"--images {folder} is given, but no record names a picture in it. Keys that may speak of pictures: "
            f"{', '.join(keys)}. Write the file's name, with its ending, under a key called image; leave --images out where "
            "all is text"
        )
    print(f"--images {folder}: no record names a picture, so all are text")


def shows_pictures(store: KeptRecords) -> bool:
    """Whether any record that is accepted shows a picture."""
    return bool(np.diff(store.starts)[store.is_accepted].any())


def make_features(columns: dict[str, str], scoring: Mapping[str, Any], store: KeptRecords) -> datasets.Features:
    """Column types of the dataset."""
    has_images = shows_pictures(store)
    return datasets.Features(
        {
            "messages": WEIGHTED_MESSAGES_FEATURE if store.has_weights else MESSAGES_FEATURE,
            # Training takes any dataset with images for one of a vision model, so a text-only one has no such column.
            **({"images": IMAGES_FEATURE} if has_images else {}),
            "image_id": datasets.Value("string"),
            **columns_of(columns, scoring),
        }
    )


def columns_of(columns: dict[str, str], scoring: Mapping[str, Any]) -> dict[str, Any]:
    """Types of the columns that the command line asks for."""
    return {**{name: datasets.Value(type_name) for name, type_name in columns.items()}, **scoring}


def main() -> None:
    """Records and pictures -> dataset, manifest and ledger; a mistake ends it with one message."""
    args = parse_arguments()
    refuse_existing_output(args.output)
    columns = dict(column.split(":") for column in args.columns)
    # The columns of scoring, and the keys that they are read from.
    scoring = {name: feature for name, feature in SCORING_FEATURES.items() if getattr(args, name) is not None}
    with scratch_folder(args.output) as scratch:
        # Read, and check each on its own.
        records, sources, held = read_records(args.input, args.input_split)
        store = KeptRecords(scratch, columns_of(columns, scoring))
        keep_records(records, store, args, held, columns, scoring)

        # Check against each other.
        inspections = check_images(store, args.max_pixels)
        ledger = Ledger()
        store.enter(ledger)
        refuse_text_alone(store, args.images)

        # Split.
        splits, leaks = {}, {"between": {}}
        images = list(store.images)
        if store.is_accepted.any():
            groups = group_records(store, inspections, args.near_duplicate_bits)
            try:
                splits = split_groups(groups, args.validation_size, args.test_size, args.seed)
            except ValueError as error:  # of a few records, most may have been rejected
                raise ValueError(f"{error}\n{ledger.table()}" if ledger.rejects else str(error)) from error
            seen = {
                name: [
                    Seen(images[number].name, None, 0, inspections[number].difference_hash)
                    for number in dict.fromkeys(number for place in places for number in store.pictures_of(place))
                ]
                for name, places in splits.items()
            }
            leaks = report_leaks(seen, args.near_duplicate_bits)

        # Write.
        unused = store.count_unused(np.flatnonzero(store.is_accepted))
        unused.pop(args.group_by, None)
        features = make_features(columns, scoring, store)
        pictures = [
            Picture(inspection.sha256, Path(image.name).name, image.read)
            for image, inspection in zip(images, inspections, strict=True)
        ]
        write_dataset(
            args.output,
            {name: KeptRows(store, places, pictures, features) for name, places in splits.items()},
            features,
            ledger=ledger,
            sources=sources,
            arguments=vars(args),
            split_rule="groups of records with the same or almost the same image"
            + (f" or the same {args.group_by}" if args.group_by else "")
            + f", shuffled with seed {args.seed}",
            unused_keys=dict(unused.most_common()),
            leak_report=leaks,
        )
    print(summarise(args.output, ledger, {name: len(places) for name, places in splits.items()}))
    if unused:
        print("keys not used: " + ", ".join(f"{key} x {number:,}" for key, number in unused.most_common()))
    if leaks["between"]:
        print(describe_leaks(leaks))


if __name__ == "__main__":
    command.run(main)
