"""Writes the dataset that training opens: all of it, or nothing."""

import glob
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from finetuning.failures import writing
from finetuning.folder_lock import give_back, try_lock
from finetuning.manifest import files_in, write_manifest
from preparing.ledger import Ledger

# Rows held in memory before they go to disk. The library's default of 1,000 is a gigabyte of 1 MB photographs.
ROWS_IN_MEMORY = 64
REJECTS = "rejects.csv"  # not in the manifest: people open it in Excel, which saves it anew


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
def own_errors() -> Iterator[None]:
    """What went wrong while rows were made, without the library's words around it."""
    try:
        yield
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error


def scratch_prefix(output: Path) -> str:
    """How the temporary folders of a preparation of `output` begin."""
    return f".{output.name}.preparing-"


def describe_file(path: Path) -> dict[str, Any]:
    """Path as given, size in bytes and SHA-256 of one source file, for the manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}


def write_dataset(
    output: Path,
    splits: Mapping[str, Sequence[Any]],
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
    `features` when it is its turn, so memory does not grow with the number of rows. A split may also be a finished
    `datasets.Dataset`: text that fits into memory is written several times faster so. An empty split is left out of the
    dataset and stands in the manifest with 0 rows. Further keyword arguments become manifest entries as they are.
    Everything is written beside `output` and renamed into place at the end: a run that dies leaves no half dataset.

    Raises ValueError when `output` exists or when no split has a row (the message lists the reject reasons).
    """
    refuse_existing_output(output)
    ledger.check()
    num_rows = {name: len(items) for name, items in splits.items()}
    with closing_lock(output), writing(output), own_errors():
        if not sum(num_rows.values()):
            raise ValueError(
                f"no row was accepted, so {output} was not written. What was read, and why it was rejected:\n"
                f"{ledger.table()}\nCorrect the input and run the command again."
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=scratch_prefix(output), dir=output.parent) as scratch:
            folder = Path(scratch) / "dataset"
            written = datasets.DatasetDict()
            datasets.disable_progress_bars()  # one bar over all splits instead
            with tqdm(total=sum(num_rows.values()), desc="writing rows", unit="row") as progress:
                for name, items in splits.items():
                    if not items:
                        continue
                    if isinstance(items, datasets.Dataset):
                        written[name] = items
                        progress.update(len(items))
                        continue

                    def rows(items=items):
                        for item in items:
                            yield make_row(item)
                            progress.update()

                    written[name] = datasets.Dataset.from_generator(
                        rows,
                        features=features,
                        cache_dir=str(Path(scratch) / "cache"),
                        split=datasets.NamedSplit(name),
                        fingerprint=f"{name}-{len(items)}",  # else the library pickles every item to compute one
                        writer_batch_size=ROWS_IN_MEMORY,
                    )
            written.save_to_disk(folder)
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


def summarise(output: Path, ledger: Ledger, num_rows: Mapping[str, int]) -> str:
    """The closing words of a command: what was read, what became of it, and where everything is."""
    rows = ", ".join(f"{name} {number:,}" for name, number in num_rows.items())
    return (
        f"{ledger.table()}\nrows written: {rows}\n"
        f"dataset:  {output}\nmanifest: {output / 'manifest.json'}\nrejects:  {output / 'rejects.csv'}"
    )
