"""How long the rows of a prepared dataset are, in tokens, without PyTorch and without decoding a picture.

Tokens are counted by the model's own `tokenizer.json` over the text of the chat template, so a length is that of the training
batch, token for token. Of many rows an even sample is counted, and all of the longest. Where a model cuts pictures into tiles,
the sizes of those rows' pictures are read from their heads.
"""

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

SAMPLE, LONGEST = 2000, 64  # rows that are counted: evenly spread, and those with most text
MOST_DIALOGUES = 8  # of a sequence, as `data.shared_prefix.group_by_image`
IMAGE_LINE = "<image>\n"
TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")
Size = tuple[int, int]  # height, width
START, END = "\ue000", "\ue001"  # stand around what is supervised; of the private use area, so in no vocabulary


@dataclass(frozen=True)
class Sequence:
    """One row as it is trained; of a shared image all its dialogues."""

    tokens: int
    supervised: int
    pictures: int
    prefix: int = 0  # tokens that its dialogues share


@dataclass(frozen=True)
class Lengths:
    """Sequences of a split: how many there are, and those that were counted."""

    total: int
    rows: int
    counted: list[Sequence]
    longest: list[Sequence]

    def mean(self, name: str) -> float:
        """Mean of a field of the counted sequences."""
        return sum(getattr(sequence, name) for sequence in self.counted) / max(len(self.counted), 1)


def mixed(parts: list[tuple[Lengths, float]]) -> Lengths:
    """Lengths of several sets and how often each is taken, as `dataset_mixer` says it -> those of all together.

    Of dialogues that share an image a part of a set is counted as so much less of each image, not of its dialogues.
    """
    totals = [round(lengths.total * weight) for lengths, weight in parts]
    counted = []
    for total, (lengths, _) in zip(totals, parts, strict=True):
        wanted = max(round(SAMPLE * total / max(sum(totals), 1)), 1)
        counted += [lengths.counted[place * len(lengths.counted) // wanted] for place in range(wanted)]
    longest = sorted((row for lengths, _ in parts for row in lengths.longest), key=lambda row: -row.tokens)[:LONGEST]
    return Lengths(sum(totals), sum(round(lengths.rows * weight) for lengths, weight in parts), counted, longest)


def read_split(dataset: str, split: str) -> pa.Table:
    """Columns `messages`, and where they are there `images` and `image_id`, of a folder that `data_prep` wrote.

    The files are mapped, not read. Raises ValueError where there is no such split.
    """
    folder = Path(dataset) / split
    state = folder / "state.json"
    if not state.is_file():
        known = sorted(path.parent.name for path in Path(dataset).glob("*/state.json"))
        there = f"there are {', '.join(known)}" if known else "no split is there"
        raise ValueError(f"{dataset}: no split {split!r} that data_prep wrote; {there}")
    tables = []
    for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        with pa.ipc.open_stream(pa.memory_map(str(folder / file["filename"]))) as reader:
            table = reader.read_all()
        if "messages" not in table.column_names:
            raise ValueError(
                f"{dataset}: split {split!r} has no column messages: prepare it with the commands of data_prep/"
            )
        tables.append(table.select([name for name in ("messages", "images", "image_id") if name in table.column_names]))
    return pa.concat_tables(tables)


def chat_renderer(template: str, special_tokens: dict[str, str]) -> Callable[[list[dict[str, Any]]], str]:
    """Messages -> the template's text, with START and END around what is supervised."""
    for word, mark in {"generation": START, "endgeneration": END}.items():
        template = re.sub(r"{%-?\s*" + word + r"\s*-?%}", "{{- '" + mark + "' -}}", template)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=False, **special_tokens)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take a row: {error}") from error

    return render


def special_tokens_of(model: Path) -> dict[str, str]:
    """`bos_token` and `eos_token` of a tokenizer's settings, as text."""
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token")}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {"bos_token": texts["bos_token"] or "<bos>", "eos_token": texts["eos_token"] or "<eos>"}


def with_pictures(messages: list[dict[str, Any]], pictures: int, views: int = 1) -> list[dict[str, Any]]:
    """Messages with a part for each of the `views` of a picture: where lines `<image>` stand, else before the first question."""
    marked = any(str(message["content"]).startswith(IMAGE_LINE) for message in messages)
    placed, to_place = [], 0 if marked else pictures
    for message in messages:
        text = str(message["content"])
        marks = 0
        while text.startswith(IMAGE_LINE):
            text, marks = text.removeprefix(IMAGE_LINE), marks + 1
        if message["role"] == "user" and to_place:
            marks, to_place = to_place, 0
        parts = [*({"type": "image"} for _ in range(marks * views)), {"type": "text", "text": text}]
        placed.append(dict(message) | {"content": parts if pictures else text})
    return placed


@dataclass(frozen=True)
class PictureCost:
    """What the pictures of a row become: `of_row(sizes)` -> (tokens, views), from heights and widths as they are shown.

    Args:
        marks: of the template's text for a picture, each of which is one of its tokens.
        reads_sizes: whether the sizes matter; else any will do.
    """

    of_row: Callable[[list[Size]], tuple[int, int]]
    marks: int = 1
    reads_sizes: bool = False


class RowCounter:
    """Counts tokens of dialogues: `tokenizer.json`, the chat template, and what pictures become."""

    def __init__(self, model: Path, template: str, cost: PictureCost):
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # Every Gemma vocabulary has them, as special tokens or not: `models.processing.load_processing_class`.
        marks = [mark for mark in TURN_MARKS if self.tokenizer.token_to_id(mark) is not None]
        self.tokenizer.add_special_tokens(marks)
        self.render = chat_renderer(template, special_tokens_of(model))
        self.cost = cost

    def count(self, dialogues: list[list[dict[str, Any]]], pictures: list[list[Size]]) -> list[Sequence]:
        """Dialogues and the sizes of their pictures -> their lengths."""
        texts = [
            self.render(with_pictures(messages, len(sizes), self.cost.marks))
            for messages, sizes in zip(dialogues, pictures, strict=True)
        ]
        plain = [text.replace(START, "").replace(END, "") for text in texts]
        encodings = self.tokenizer.encode_batch(plain, add_special_tokens=False)
        sequences = []
        for text, encoding, sizes in zip(texts, encodings, pictures, strict=True):
            spans = spans_of(text)
            supervised = sum(any(a < end and start < b for a, b in spans) for start, end in encoding.offsets)
            tokens, views = self.cost.of_row(sizes) if sizes else (0, 0)
            added = tokens - len(sizes) * self.cost.marks
            prefix = self.prefix(encoding.tokens) + added if sizes else 0
            sequences.append(Sequence(len(encoding.ids) + added, supervised, views, prefix))
        return sequences

    def prefix(self, tokens: list[str]) -> int:
        """Tokens up to the last mark of a picture."""
        return max((place + 1 for place, token in enumerate(tokens) if token == "<image>"), default=0)  # noqa: S105


def spans_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of what stands between START and END, in the text without them."""
    spans, removed, start = [], 0, 0
    for place, character in enumerate(text):
        if character == START:
            start, removed = place - removed, removed + 1
        elif character == END:
            spans.append((start, place - removed))
            removed += 1
    return spans


def lengths_of(table: pa.Table, counter: RowCounter, *, shares_prefix: bool, folder: str = "") -> Lengths:
    """Lengths of the rows of a table; of sequences of dialogues about one image where `shares_prefix`.

    Raises ValueError for rows that are not as the data contract has them.
    """
    try:
        return count_lengths(table, counter, shares_prefix=shares_prefix, folder=folder)
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(f"rows that cannot be counted ({type(error).__name__}: {error}): try check_data.py") from error


def count_lengths(table: pa.Table, counter: RowCounter, *, shares_prefix: bool, folder: str) -> Lengths:
    """`lengths_of`, of rows as the data contract has them."""
    pictures = pictures_of(table)
    groups = group_rows(table, pictures) if shares_prefix else [[row] for row in range(len(table))]
    characters = pc.utf8_length(pc.struct_field(flat_messages(table), "content"))
    characters_of = row_sums(table.column("messages"), characters)
    of_group = [sum(characters_of[row] for row in group) for group in groups]
    order = sorted(range(len(groups)), key=of_group.__getitem__, reverse=True)[:LONGEST]
    step = max(len(groups) / SAMPLE, 1)
    sample = sorted({int(index * step) for index in range(min(SAMPLE, len(groups)))})
    wanted = sorted({row for index in {*order, *sample} for row in groups[index]})
    dialogues = table.column("messages").take(wanted).to_pylist()
    sizes = (
        sizes_of(table, wanted, folder) if counter.cost.reads_sizes else [[(1, 1)] * pictures[row] for row in wanted]
    )
    counted = dict(zip(wanted, counter.count(dialogues, sizes), strict=True))
    sequences = {index: join([counted[row] for row in groups[index]]) for index in {*order, *sample}}
    longest = sorted((sequences[index] for index in order), key=lambda sequence: sequence.tokens, reverse=True)
    return Lengths(len(groups), len(table), [sequences[index] for index in sample], longest)


def flat_messages(table: pa.Table) -> pa.Array:
    """All messages of all rows, one after the other."""
    return pc.list_flatten(table.column("messages"))


def row_sums(lists: pa.ChunkedArray, values: pa.Array) -> list[int]:
    """Sum of `values` of each list; they belong to the lists' items in order."""
    sums, start = [], 0
    numbers = values.to_pylist()
    for length in pc.list_value_length(lists).to_pylist():
        sums.append(sum(number or 0 for number in numbers[start : start + (length or 0)]))
        start += length or 0
    return sums


def pictures_of(table: pa.Table) -> list[int]:
    """Number of pictures of each row."""
    if "images" not in table.column_names or pa.types.is_null(table.column("images").type):
        return [0] * len(table)
    return [length or 0 for length in pc.list_value_length(table.column("images")).to_pylist()]


def sizes_of(table: pa.Table, rows: list[int], folder: str) -> list[list[Size]]:
    """Height and width of every picture of these rows, as it is shown; `folder` is the dataset's, which may hold the bytes."""
    from PIL import ExifTags, Image  # only where sizes matter

    from finetuning.data.picture_table import StoredImage

    stored, found = StoredImage(folder=str(Path(folder).resolve())), []
    for images in table.column("images").take(rows).to_pylist():
        of_row = []
        for image in images or []:
            data = stored.decode_example(image)
            with Image.open(io.BytesIO(data["bytes"]) if data["bytes"] is not None else data["path"]) as picture:
                lies = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
                of_row.append((picture.width, picture.height) if lies else (picture.height, picture.width))
        found.append(of_row)
    return found


def group_rows(table: pa.Table, pictures: list[int]) -> list[list[int]]:
    """Rows of one image together, at most `MOST_DIALOGUES`; a row without pictures alone."""
    names = table.column("image_id").to_pylist() if "image_id" in table.column_names else range(len(table))
    rows_of: dict[Any, list[int]] = defaultdict(list)
    for row, (name, number) in enumerate(zip(names, pictures, strict=True)):
        rows_of[name if number else ("alone", row)].append(row)
    return [
        rows[start : start + MOST_DIALOGUES]
        for rows in rows_of.values()
        for start in range(0, len(rows), MOST_DIALOGUES)
    ]


def several_dialogues_an_image(table: pa.Table) -> bool:
    """Whether some image has several rows: what `share_image_prefix` follows where it is not set."""
    if "image_id" not in table.column_names:
        return False
    return max(Counter(table.column("image_id").to_pylist()).values(), default=0) > 1


def join(dialogues: list[Sequence]) -> Sequence:
    """Dialogues about one image as one sequence: the prefix once, of all but the last one token less."""
    first = dialogues[0]
    if len(dialogues) == 1:
        return first
    tokens = first.prefix + sum(one.tokens - first.prefix for one in dialogues) - (len(dialogues) - 1)
    return Sequence(tokens, sum(one.supervised for one in dialogues), first.pictures, first.prefix)
