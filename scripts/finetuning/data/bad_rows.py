"""Rows with a picture that does not decode: found before a training starts, and passed over, at most as many as allowed."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetuning.data.dataset import describe_rows
from finetuning.data.pictures import PictureError, open_picture
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
    with tqdm(total=len(rows), desc=f"Opening pictures of {rows.split}", unit="row") as bar:
        for bad in batches:
            found += bad
            bar.update(min(BATCH_SIZE, len(rows) - bar.n))
    return found


def bad_among(rows: Dataset, split: str, places: Sequence[int]) -> list[dict[str, Any]]:
    """`find_bad_rows` of the rows at `places`."""
    found = []
    for place in places:
        for number, image in enumerate(rows[place]["images"] or [], start=1):
            try:
                open_picture(image)
            except PictureError as error:
                name = f"picture {number} ({image.get('path') or 'without a name'})"
                found.append({"split": split, "row": place, "picture": name, "reason": str(error)})
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
