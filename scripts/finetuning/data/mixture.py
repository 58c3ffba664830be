"""Training rows of several sets as one: the recipe's own, and of others as many as their weights say."""

import random
from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset, List, concatenate_datasets

from finetuning.arguments import ScriptArguments
from finetuning.data.dataset import open_dataset, open_split
from finetuning.data.picture_table import StoredImage, with_absolute_names

# What training reads of a row beside its number and its image; other columns belong to one set.
COLUMNS = ("messages", "images")


def open_mixed_in(script_args: ScriptArguments, *, vision: bool, seed: int) -> list[Dataset]:
    """The training rows of each set of `dataset_mixer`, as many as its weight says: 0.2 a fifth of them, 2 each twice.

    Which rows a fraction takes follows from `seed`, so that a run that is continued reads the same. Raises ValueError as
    `open_dataset` and `open_split` do.
    """
    parts = []
    for name, weight in (script_args.dataset_mixer or {}).items():
        rows = open_split(open_dataset(name, vision=vision), script_args.dataset_train_split, name)
        if weight == 1:
            parts.append(rows)
            continue
        whole, rest = divmod(round(weight * len(rows)), len(rows))
        drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(rows)), rest))
        parts.append(rows.select([*range(len(rows))] * whole + drawn))
    return parts


def mix(rows: Dataset, parts: Sequence[Dataset], script_args: ScriptArguments) -> Dataset:
    """`rows` of the recipe's own set, then those of each part; `row` counts through all, and says so where it is printed.

    An image belongs to its set (`image_id`). Training draws the rows in a new order each epoch. Raises ValueError for a set
    whose messages have other fields.
    """
    if not parts:
        return rows
    names = [script_args.dataset_name, *(script_args.dataset_mixer or {})]
    start, alike = 0, []
    for name, part in zip(names, [rows, *parts], strict=True):
        if part.features["messages"] != rows.features["messages"]:
            raise ValueError(
                f"dataset_mixer: messages of {name} are {part.features['messages']}, those of {names[0]} "
                f"{rows.features['messages']}: prepare both with the same command of data_prep/"
            )
        ids = part["image_id"] if "image_id" in part.column_names else range(len(part))
        numbers = {"row": range(start, start + len(part)), "image_id": [f"{name} {image_id}" for image_id in ids]}
        part = with_absolute_names(part.select_columns([column for column in COLUMNS if column in part.column_names]))
        for column, values in numbers.items():
            part = part.add_column(column, list(values))
        PartialState().print(f"  rows {start:,} to {start + len(part) - 1:,}: {name}")
        start += len(part)
        alike.append(part)
    if any(isinstance(getattr(part.features.get("images"), "feature", None), StoredImage) for part in alike):
        for part in alike:  # it reads pictures that lie in rows, too
            part.info.features["images"] = List(StoredImage())
    return concatenate_datasets(alike)
