"""Writes the dataset that training opens: all of it, or nothing."""

import glob
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from finetuning.data.picture_table import PictureWriter
from finetuning.failures import writing
from finetuning.folder_lock import give_back, try_lock
from finetuning.manifest import files_in, made_whole, write_manifest
from preparing.ledger import Ledger

# Pictures held in memory before they go to disk. The library's default of 1,000 is a gigabyte of 1 MB photographs.
PICTURES_IN_MEMORY = 64
# Rows of text and numbers that are held: pictures lie in a table of their own.
TEXTS_IN_MEMORY = 1000
SPLIT_FILE = "data-00000-of-00001.arrow"
REJECTS = "rejects.csv"  # not in the manifest: people open it in Excel, which saves it anew


class Picture(NamedTuple):
    """A picture of a row: the hash of its bytes, its name, and how to read it."""

    digest: str
    name: str
    read: Callable[[], bytes]


@runtime_checkable
class Tables(Protocol):
    """Rows of a split that come as Arrow tables of its columns; their pictures go to the writer as they come."""

    def __len__(self) -> int: ...

    def tables(self, writer: PictureWriter) -> Iterable[pa.Table]: ...


def refuse_existing_output(output: Path) -> None:
    """Raises ValueError when `output` exists, or another process prepares it; else it is locked until this one ends.

    Call it first: nobody wants to learn this after ten minutes of work. What a killed preparation left is removed.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} already exists and is never overwritten: remove it or choose another --output")
    if problem := try_lock(output, "a preparation"):
        raise ValueError(problem)
    for left in output.parent.glob(f"{glob.escape(scratch_prefix(output))}*"):
        shutil.rmtree(left)


@contextmanager
def closing_lock(output: Path) -> Iterator[None]:
    """The lock that `refuse_existing_output` took is given back when this block ends."""
    try:
        yield
    finally:
        give_back(output)


@contextmanager
def whole_output(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when this block ends well; the lock of `refuse_existing_output` is given back."""
    with closing_lock(output), writing(output), made_whole(output, described=False) as folder:
        yield folder


def scratch_prefix(output: Path) -> str:
    """How the temporary folders of a preparation of `output` begin."""
    return f".{output.name}.preparing-"


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, on its disk, that is removed at the end; by the next preparation where it was killed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=scratch_prefix(output), dir=output.parent) as scratch:
        yield Path(scratch)


def describe_file(path: Path) -> dict[str, Any]:
    """Path as given, size in bytes and SHA-256 of one source file, for the manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}


def write_dataset(
    output: Path,
    splits: Mapping[str, Sequence[Any] | Tables],
    features: datasets.Features,
    *,
    ledger: Ledger,
    sources: Iterable[dict[str, Any]],
    arguments: Mapping[str, Any],
    split_rule: str,
    make_row: Callable[[Any], dict[str, Any]] = lambda item: item,
    **manifest: Any,
) -> Path:
    """Writes `output/` with one dataset split per entry of `splits`, `manifest.json` and `rejects.csv`.

    `splits` holds light items (a finished row, or the indices it is built from); `make_row` turns one into a row of
    `features` when it is its turn, so memory does not grow with the number of rows. Each of a row's `images` is a
    `Picture`: its bytes are written once, into a table of their own, by which rows name it. A split may also be a finished
    `datasets.Dataset`, or `Tables`: text is written several times faster so. An empty split is left out of the
    dataset and stands in the manifest with 0 rows. Further keyword arguments become manifest entries as they are.
    Everything is written beside `output` and renamed into place at the end: a run that dies leaves no half dataset.

    Raises ValueError when `output` exists or when no split has a row (the message lists the reject reasons).
    """
    refuse_existing_output(output)
    ledger.check()
    num_rows = {name: len(items) for name, items in splits.items()}
    with closing_lock(output), writing(output):
        if not sum(num_rows.values()):
            raise ValueError(
                f"no row was accepted, so {output} was not written. What was read, and why it was rejected:\n"
                f"{ledger.table()}\nCorrect the input and run the command again."
            )
        with scratch_folder(output) as scratch:
            folder = scratch / "dataset"
            pictures = PictureWriter(folder, PICTURES_IN_MEMORY)
            datasets.disable_progress_bars()  # one bar over all splits instead
            with tqdm(total=sum(num_rows.values()), desc="writing rows", unit="row") as progress:
                for name, items in splits.items():
                    if not items:
                        continue
                    if isinstance(items, datasets.Dataset):
                        items.save_to_disk(folder / name)
                        progress.update(len(items))
                        continue
                    with SplitWriter(folder, name, features) as split:
                        if isinstance(items, Tables):
                            for table in items.tables(pictures):
                                split.write_table(table)
                                progress.update(len(table))
                            continue
                        for item in items:
                            row = make_row(item)
                            if "images" in row:
                                row["images"] = [pictures.name(*picture) for picture in row["images"]]
                            split.write(row)
                            progress.update()
            pictures.close()
            splits_of = {"splits": [name for name, items in splits.items() if items]}
            (folder / "dataset_dict.json").write_text(json.dumps(splits_of), encoding="utf-8")
            ledger.write_csv(folder / REJECTS)
            contents = {
                "rows": num_rows,
                "split_rule": split_rule,
                "read": ledger.counts(),
                "reject_reasons": dict(ledger.reasons().most_common()),
                "sources": list(sources),
                "arguments": {
                    name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()
                },
                **manifest,
                "written_with": {"datasets": version("datasets")},
            }
            write_manifest(folder, [path for path in files_in(folder) if path.name != REJECTS], contents)
            folder.rename(output)
    return output


class SplitWriter:
    """Rows of one split straight into the folder that `load_from_disk` opens.

    `save_to_disk` would write them a second time, and look on the disk for pictures that a row names in a table.
    """

    def __init__(self, folder: Path, name: str, features: datasets.Features):
        self.folder, self.name, self.features, self.num_rows = folder / name, name, features, 0
        self.folder.mkdir(parents=True)

    def __enter__(self) -> "SplitWriter":
        self.writer = ArrowWriter(
            path=str(self.folder / SPLIT_FILE), features=self.features, writer_batch_size=TEXTS_IN_MEMORY
        )
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self.writer.write(row)
        self.num_rows += 1

    def write_table(self, table: pa.Table) -> None:
        """Add rows."""
        self.writer.write_table(table)
        self.num_rows += len(table)

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.writer.finalize()
            state = {
                "_data_files": [{"filename": SPLIT_FILE}],
                "_fingerprint": f"{self.name}-{self.num_rows}",
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": self.name,
            }
            (self.folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
            datasets.DatasetInfo(features=self.features).write_to_directory(str(self.folder))
        self.writer.close()


def summarise(output: Path, ledger: Ledger, num_rows: Mapping[str, int]) -> str:
    """The closing words of a command: what was read, what became of it, and where everything is."""
    rows = ", ".join(f"{name} {number:,}" for name, number in num_rows.items())
    return (
        f"{ledger.table()}\nrows written: {rows}\n"
        f"dataset:  {output}\nmanifest: {output / 'manifest.json'}\nrejects:  {output / 'rejects.csv'}"
    )
