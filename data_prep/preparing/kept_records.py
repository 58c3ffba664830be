"""Records of a million conversations: their words on disk, numbers of them in memory, until it is known where they go."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from finetuning.data.picture_table import PictureWriter
from preparing.conversations import MESSAGES_FEATURE
from preparing.dataset_writer import TEXTS_IN_MEMORY, Picture
from preparing.ledger import Ledger

# What a kept row has beside the columns of the dataset.
OWN_FEATURES = {
    "messages": MESSAGES_FEATURE,
    "weights": datasets.List(datasets.Value("int64")),  # of its turns; null where it has none
    "pictures": datasets.List(
        datasets.Value("int32")
    ),  # numbers of its pictures, in the order in which they were first named
    "image_id": datasets.Value("string"),
}
NO_GROUP = -1


class KeptRecords:
    """Takes records one after the other, keeps the words of those without a problem in a file, and forgets the rest.

    A kept record is known by its place among those that were kept. `finish` ends the taking.

    Args:
        folder: where the file goes; the caller removes it.
        columns: further columns of the dataset, of which `add` is given the values.
    """

    def __init__(self, folder: Path, columns: Mapping[str, Any]):
        features = datasets.Features({**OWN_FEATURES, **columns})
        self.schema, self.path = features.arrow_schema, folder / "records.arrow"
        self.writer = pa.ipc.new_stream(str(self.path), self.schema)
        self.held: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.lines = array("q")  # of every record, kept or not
        self.problems: dict[int, tuple[str, str]] = {}  # by number, from 1
        self.numbers, self.groups, self.unused = array("q"), array("q"), array("q")  # of kept ones
        self.words = bytearray()  # 16 bytes of each kept one: a hash of roles, words and weights
        self.num_of_group: dict[str, int] = {}
        self.num_of_unused: dict[tuple[str, ...], int] = {}
        self.images: dict[Any, int] = {}  # image -> its number
        self.has_weights = False

    def add(self, record: Any, values: Mapping[str, Any], group: str | None) -> None:
        """Take the next record: `messages`, `images`, `image_id`, `unused`, `line`, `problem`, as `prepare_conversations` has it."""
        self.lines.append(record.line)
        if not self.files:
            self.files.append(record.file)
        if record.problem:
            self.problems[len(self.lines)] = record.problem
            return
        self.numbers.append(len(self.lines))
        self.groups.append(NO_GROUP if group is None else self.num_of_group.setdefault(group, len(self.num_of_group)))
        unused = tuple(record.unused)
        self.unused.append(self.num_of_unused.setdefault(unused, len(self.num_of_unused)))
        words = [(message["role"], message["content"], message.get("weight", 1)) for message in record.messages]
        self.words += hashlib.blake2b(repr(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        weights = [weight for _, _, weight in words] if any("weight" in turn for turn in record.messages) else None
        self.has_weights |= weights is not None
        pictures = [self.images.setdefault(image, len(self.images)) for image in record.images]
        messages = [{"role": role, "content": content} for role, content, _ in words]
        row = {"messages": messages, "weights": weights, "pictures": pictures, "image_id": record.image_id}
        self.held.append(row | values)
        if len(self.held) == TEXTS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.held, schema=self.schema))
        self.held = []

    def finish(self) -> None:
        """Everything is taken: the rows are mapped into memory, none has been rejected since."""
        self._write()
        self.writer.close()
        self.rows = datasets.Dataset.from_file(str(self.path))
        self.is_accepted = np.ones(len(self.rows), dtype=bool)
        pictures = self.rows.data.column("pictures").combine_chunks()
        self.starts = np.asarray(pictures.offsets, dtype=np.int64)  # of row n: starts[n] to starts[n + 1]
        self.pictures = np.asarray(pictures.values)

    def pictures_of(self, place: int) -> list[int]:
        """Numbers of the pictures of a kept record."""
        return self.pictures[self.starts[place] : self.starts[place + 1]].tolist()

    def reject(self, place: int, reason: str, detail: str) -> None:
        """Note why a kept record is left out after all; the first reason stays."""
        if self.is_accepted[place]:
            self.is_accepted[place] = False
            self.problems[self.numbers[place]] = (reason, detail)

    def reject_with_pictures(self, problems: Mapping[int, str | tuple[str, str]]) -> None:
        """Reject the records that show a picture with a problem, `{number: (reason, detail)}`."""
        if not problems:
            return
        bad = np.flatnonzero(np.isin(self.pictures, list(problems)))
        for place in np.unique(np.searchsorted(self.starts, bad, side="right") - 1).tolist():
            first = next(number for number in self.pictures_of(place) if number in problems)
            self.reject(place, *problems[first])

    def reject_duplicates(self, digests: Sequence[str]) -> None:
        """Reject records whose pictures, by the hash of each, and words are those of an earlier one."""
        contents = np.unique(np.array(digests or [""]), return_inverse=True)[1].astype(np.int32)
        keys = bytearray()
        shown = contents[self.pictures] if len(self.pictures) else self.pictures
        for place in range(len(self.rows)):
            same = hashlib.blake2b(self.words[16 * place : 16 * place + 16], digest_size=16)
            same.update(shown[self.starts[place] : self.starts[place + 1]].tobytes())
            keys += same.digest()
        halves = np.frombuffer(bytes(keys), dtype=np.uint64).reshape(-1, 2)[self.is_accepted]
        places = np.flatnonzero(self.is_accepted)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first comes first
        is_twin = np.concatenate([[False], (halves[order][1:] == halves[order][:-1]).all(axis=1)]) if len(order) else []
        first = 0
        for position, twin in zip(order.tolist(), is_twin, strict=True):
            first = first if twin else position
            if twin:
                number = self.numbers[places[first]]
                where = f"record {number}, line {self.lines[number - 1]}"
                self.reject(int(places[position]), "duplicate", f"same images and words as {where}")

    def enter(self, ledger: Ledger) -> None:
        """Every record into the ledger; where a line holds several, the detail begins with the record's number."""
        lines = np.asarray(self.lines)
        shared = np.zeros(len(lines) + 1, dtype=bool)
        shared[1:-1] = lines[1:] == lines[:-1]
        ledger.read("records", len(lines))
        ledger.accept("records", len(lines) - len(self.problems))
        for number in sorted(self.problems):
            reason, detail = self.problems[number]
            where = f"record {number}: " if shared[number - 1] or shared[number] else ""
            ledger.reject("records", self.files[0], self.lines[number - 1], reason, where + detail)

    def pairs_of_groups(self, places: np.ndarray, num_images: int) -> Iterator[np.ndarray]:
        """Pairs of nodes that belong together: images, and behind them the records of `places`, in this order."""
        rows = np.full(len(self.rows), -1)
        rows[places] = num_images + np.arange(len(places))
        of_picture = np.repeat(rows, np.diff(self.starts))
        shown = of_picture >= 0
        yield np.stack([of_picture[shown], self.pictures[shown]], axis=1)
        groups = np.asarray(self.groups)[places]
        first = np.unique(groups, return_index=True)[1]
        of_group = num_images + first[np.searchsorted(groups[first], groups)]
        in_group = groups != NO_GROUP
        yield np.stack([num_images + np.arange(len(places)), of_group], axis=1)[in_group]

    def count_unused(self, places: np.ndarray) -> Counter[str]:
        """How many of these records have each key that is not used."""
        numbers = np.bincount(np.asarray(self.unused)[places], minlength=len(self.num_of_unused)).tolist()
        counts: Counter[str] = Counter()
        for keys, number in zip(self.num_of_unused, numbers, strict=True):
            for key in keys if number else ():
                counts[key] += number
        return counts


class KeptRows:
    """A split: kept records in an order of their own, as tables of the dataset's columns.

    Args:
        kept: where they are.
        places: of the records.
        pictures: by number.
        features: of the dataset.
    """

    def __init__(
        self, kept: KeptRecords, places: Sequence[int], pictures: Sequence[Picture], features: datasets.Features
    ):
        self.kept, self.places, self.pictures, self.features = kept, places, pictures, features

    def __len__(self) -> int:
        return len(self.places)

    def tables(self, writer: PictureWriter) -> Iterable[pa.Table]:
        """The rows in tables of some; pictures go to the `writer` as they come."""
        rows = self.kept.rows.select(self.places).with_format("arrow")
        for start in range(0, len(rows), TEXTS_IN_MEMORY):
            table = rows[start : start + TEXTS_IN_MEMORY].combine_chunks()
            columns = {name: table.column(name) for name in self.features if name in table.column_names}
            if self.kept.has_weights:
                columns["messages"] = pa.array(map(with_weights, table.column("messages"), table.column("weights")))
            if "images" in self.features:
                columns["images"] = pa.array(
                    [[writer.name(*self.pictures[n]) for n in numbers] for numbers in table["pictures"].to_pylist()],
                    self.features.arrow_schema.field("images").type,
                )
            schema = self.features.arrow_schema
            yield pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def with_weights(messages: pa.Scalar, weights: pa.Scalar) -> list[dict[str, Any]]:
    """Turns with a weight each, 1 where nothing was said."""
    turns = messages.as_py()
    told = weights.as_py() or [1] * len(turns)
    return [turn | {"weight": weight} for turn, weight in zip(turns, told, strict=True)]
