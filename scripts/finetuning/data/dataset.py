"""Opening the dataset that data preparation wrote, and refusing what training could not use."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from transformers import IntervalStrategy

from finetuning.arguments import ScriptArguments, TrainingArguments
from finetuning.model_files import refuse_missing_dataset


def open_dataset(name: str, *, vision: bool) -> DatasetDict:
    """A folder that `data_prep` wrote, a folder of JSONL or Parquet files, or a Hub dataset; all splits.

    For a vision model `images` holds files' bytes, which `finetuning.data.pictures.open_picture` opens.

    Raises ValueError that lists every missing column, or says which command makes what is not there.
    """
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file():
            dataset = load_from_disk(name)
        else:
            refuse_missing_dataset(name, vision=vision)
            dataset = load_dataset(name)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name}: neither a folder nor a dataset that could be reached on the Hub ({str(error).splitlines()[0]}). "
            "Check the name and the network; without network prepare a folder with the commands in data_prep/"
        ) from error
    wanted = {"messages", "images"} if vision else {"messages"}
    problems = [
        f"split {split!r} lacks {', '.join(sorted(wanted - set(rows.column_names)))} and has {', '.join(rows.column_names)}"
        for split, rows in dataset.items()
        if not wanted <= set(rows.column_names)
    ]
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems) + ". docs/data.md describes the columns (The data contract)")
    if vision:
        dataset = DatasetDict({split: with_undecoded_pictures(rows) for split, rows in dataset.items()})
    return dataset


def with_undecoded_pictures(rows: Dataset) -> Dataset:
    """`images` as lists of `{"bytes", "path"}`: the library would open them by other rules than `open_picture`.

    Raises ValueError where a row holds a single picture, not a list.
    """
    feature = rows.features["images"]
    if not isinstance(feature, List) and feature != Value("null"):
        raise ValueError(
            f"images is {feature}, expected a list of pictures in each row: write [picture], or prepare the data with "
            "data_prep/prepare_conversations.py"
        )
    if not isinstance(feature, List) or not isinstance(feature.feature, Image):
        return rows.cast_column("images", List(Image(decode=False)))
    # Nothing of the table changes; a cast would copy the split into a cache beside it.
    rows.info.features["images"] = List(Image(decode=False))
    return rows


def open_split(dataset: DatasetDict, split: str, name: str) -> Dataset:
    """One split with at least one row; each row knows its number in the split (`row`), to be named by."""
    if split not in dataset or not len(dataset[split]):
        sizes = ", ".join(f"{key} ({len(rows)})" for key, rows in dataset.items())
        raise ValueError(f"{name}: no rows in split {split!r}; there are {sizes}")
    rows = dataset[split]
    return rows.add_column("row", range(len(rows))) if "row" not in rows.column_names else rows


def open_validation(
    dataset: DatasetDict, script_args: ScriptArguments, training_args: TrainingArguments
) -> Dataset | None:
    """The split to evaluate on while training, or None, and then no evaluation: `--split ordered` holds none back."""
    split = script_args.dataset_validation_split
    if split in dataset and len(dataset[split]):
        return open_split(dataset, split, script_args.dataset_name)
    if training_args.eval_strategy != "no":
        PartialState().print(
            f"{script_args.dataset_name}: no rows in split {split!r}, so nothing is evaluated while training"
        )
        training_args.eval_strategy = IntervalStrategy.NO
    return None


def spread(rows: Dataset, number: int) -> Dataset:
    """At most `number` rows, evenly spaced: consecutive frames of a video would all show the same scene."""
    if len(rows) <= number:
        return rows
    return rows.select([round(position * (len(rows) - 1) / max(number - 1, 1)) for position in range(number)])
