"""Rows with a picture that does not decode: found before a training starts, and passed over, at most as many as allowed."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetuning.data.dataset import describe_rows
from finetuning.data.pictures import PictureError, name_picture, open_picture
from finetuning.failures import lost_loaders_named
from finetuning.main_process import found_by_main

BATCH_SIZE = 64


def pass_over_bad_rows(
    most: int, train_rows: Dataset, validation_rows: Dataset | None
) -> tuple[Dataset, Dataset | None, list[dict[str, Any]]]:
    """The splits without rows whose pictures do not decode, and those rows: `{"split", "row", "picture", "reason"}`.

    The next good row stands in for a bad one: every step keeps its rows, so that a run that met a bad one goes on with
    `skip_bad_rows` as if nothing had been. All pictures are opened, on all cores, which takes as long as check_data.py.

    Raises ValueError that lists them where there are more than `most`.
    """
    splits = [rows for rows in (train_rows, validation_rows) if rows is not None]
    found = found_by_main(lambda: [find_bad_rows(rows) for rows in splits])
    bad = [row for of_split in found for row in of_split]
    named = "\n".join(
        f"  split {row['split']}, row {row['row']}, {row['picture']}: {row['reason']}" for row in bad[:20]
    )
    if len({(row["split"], row["row"]) for row in bad}) > most:
        raise ValueError(
            f"{describe_rows(train_rows)}: more rows than skip_bad_rows: {most} allows have a picture that does not "
            f"decode. Replace the files and prepare again, or allow more:\n{named}"
        )
    if bad:
        PartialState().print(f"Passed over, their pictures do not decode:\n{named}")
    kept = [without(rows, {row["row"] for row in of_split}) for rows, of_split in zip(splits, found, strict=True)]
    return kept[0], kept[1] if validation_rows is not None else None, bad


def find_bad_rows(rows: Dataset) -> list[dict[str, Any]]:
    """Each picture of `rows` that does not decode, in order."""
    found = []
    batches = DataLoader(
        range(len(rows)),
        batch_size=BATCH_SIZE,
        collate_fn=partial(bad_among, rows.select_columns("images"), str(rows.split)),
        num_workers=len(os.sched_getaffinity(0)),
    )
    with (
        tqdm(total=len(rows), desc=f"Opening pictures of {rows.split}", unit="row") as bar,
        lost_reader_named(rows, lambda: range(bar.n, bar.n + 2 * batches.num_workers * BATCH_SIZE)),
    ):
        for bad in batches:
            found += bad
            bar.update(min(BATCH_SIZE, len(rows) - bar.n))
    return found


def lost_reader_named(rows: Dataset, in_work: Callable[[], range]) -> AbstractContextManager[None]:
    """A process that reads `rows` and is gone (PyTorch's RuntimeError) becomes a ValueError that names the picture.

    `in_work()` are the places of the rows that may have been read then. Each is opened again in a child.
    """

    def describe(process: str, ended_by: str) -> str:
        places = range(in_work().start, min(in_work().stop, len(rows)))
        if named := picture_that_ends_a_process(rows, places):
            return f"{describe_rows(rows)}, {named}. Replace the file and prepare again"
        return (
            f"{describe_rows(rows)}: a process that reads rows was ended by {ended_by} while rows {places.start:,} to "
            f"{places.stop - 1:,} were in work; each of their pictures opens by itself. Is there too little memory?"
        )

    return lost_loaders_named(describe)


def picture_that_ends_a_process(rows: Dataset, places: Sequence[int]) -> str | None:
    """`row 3, picture 1 (a.jpg): ...` of the first picture whose decoder takes its process with it, found in a child."""
    receiver, sender = (context := multiprocessing.get_context("fork")).Pipe(duplex=False)
    child = context.Process(target=_open_all, args=(rows, places, sender))
    child.start()
    sender.close()
    last = None
    with suppress(EOFError):
        while True:
            last = receiver.recv()
    child.join()
    if last is None or child.exitcode == 0:
        return None
    code = child.exitcode or 0
    return f"{last}: a process that opens it is ended{f' by {signal.Signals(-code).name}' if code < 0 else ''}"


def _open_all(rows: Dataset, places: Sequence[int], sender: Connection) -> None:
    """Send the name of each picture before it is opened."""
    for place in places:
        row = rows[place]
        for number, picture in enumerate(row.get("images") or [], start=1):
            sender.send(f"row {row.get('row', place)}, {name_picture(number, picture)}")
            with suppress(PictureError):
                open_picture(picture)


def bad_among(rows: Dataset, split: str, places: Sequence[int]) -> list[dict[str, Any]]:
    """`find_bad_rows` of the rows at `places`."""
    found = []
    for place in places:
        for number, image in enumerate(rows[place]["images"] or [], start=1):
            try:
                open_picture(image)
            except PictureError as error:
                picture = name_picture(number, image)
                found.append({"split": split, "row": place, "picture": picture, "reason": str(error)})
    return found


def without(rows: Dataset, bad: set[int]) -> Dataset:
    """As many rows; the next good row stands in for each of `bad`. Raises ValueError where none is good."""
    if not bad:
        return rows
    good = [place for place in range(len(rows)) if place not in bad]
    if not good:
        raise ValueError(f"{describe_rows(rows)}: no row has pictures that decode")
    # Pieces of neighbours: a choice of single rows would be copied, pictures and all, when a column is added to it.
    pieces, start = [], 0
    for place in sorted(bad):
        following = next((other for other in range(place + 1, len(rows)) if other not in bad), good[0])
        pieces += [range(start, place), range(following, following + 1)]
        start = place + 1
    kept = concatenate_datasets([rows.select(piece) for piece in [*pieces, range(start, len(rows))] if piece])
    kept.info.dataset_name = rows.info.dataset_name
    return kept
