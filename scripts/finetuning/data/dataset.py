"""Opening the dataset that data preparation wrote, and refusing what training could not use."""

import json
import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from finetuning.data.picture_table import with_stored_pictures
from finetuning.main_process import refuse_together
from finetuning.manifest import described_files, is_sealed, manifest_problems
from finetuning.model_files import refuse_missing_dataset

if TYPE_CHECKING:  # the Trainer comes with them, which the check of a dataset does not need
    from finetuning.arguments import ScriptArguments, TrainingArguments


def open_dataset(name: str, *, vision: bool) -> DatasetDict:
    """A folder that `data_prep` wrote, a folder of JSONL or Parquet files, or a Hub dataset; all splits.

    For a vision model `images` holds files' bytes, which `finetuning.data.pictures.open_picture` opens.

    A prepared dataset is compared with its manifest first, on the main process: a flipped bit in a picture is found.

    Raises ValueError that lists every missing column or damaged file, or says which command makes what is not there.
    """
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or is_sealed(folder):
            refuse_together(lambda: describe_damage(folder))
            dataset = load_from_disk(name)
        else:
            refuse_missing_dataset(name, vision=vision)
            dataset = load_dataset(name)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name}: neither a folder nor a dataset that could be reached on the Hub ({str(error).splitlines()[0]}). "
            "Check the name and the network; without network prepare a folder with the commands in data_prep/"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"{name}: cannot be read: {error.__cause__ or error}") from error
    wanted = {"messages", "images"} if vision else {"messages"}
    problems = [
        f"split {split!r} lacks {', '.join(sorted(wanted - set(rows.column_names)))} and has {', '.join(rows.column_names)}"
        for split, rows in dataset.items()
        if not wanted <= set(rows.column_names)
    ]
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems) + ". docs/data.md describes the columns (The data contract)")
    # A text model's rows may have pictures, too, which nobody looks at: they must not be looked for either.
    return DatasetDict(
        {
            split: with_undecoded_pictures(rows, folder)
            if vision or is_list_of_pictures(rows.features.get("images"))
            else rows
            for split, rows in dataset.items()
        }
    )


def describe_damage(folder: Path) -> str | None:
    """A sentence that names the damaged files of a dataset on disk; None where all is whole."""
    remedy = "Prepare it again, or restore it from a copy"
    try:
        if described_files(folder) is not None:
            problems = manifest_problems(folder)
        else:
            problems = unreadable_files(sorted(folder.glob("*/data-*.arrow")))
    except ValueError as error:
        return str(error)
    return f"{folder}: damaged: {'; '.join(problems)}. {remedy}" if problems else None


def unreadable_files(paths: Sequence[Path]) -> list[str]:
    """Arrow files that cannot be read, each with why: a damaged one may end the process that reads it, so a child does."""
    problems, left = [], list(paths)
    context = multiprocessing.get_context("fork")
    while left:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_read_arrow_files, args=(left, sender))
        child.start()
        sender.close()
        found = []
        try:
            while True:
                found.append(receiver.recv())
        except EOFError:
            child.join()
        problems += filter(None, found)
        if child.exitcode == 0:
            break
        problems.append(f"{left[len(found)]}: a process that reads it ends by {signal.Signals(-child.exitcode).name}")
        left = left[len(found) + 1 :]
    return problems


def _read_arrow_files(paths: Sequence[Path], sender: Connection) -> None:
    """Send None or what is wrong for each file; offsets of lists and strings are checked, pictures are not read."""
    for path in paths:
        problem = None
        try:
            with pa.memory_map(str(path)) as file:
                options = pa.ipc.IpcReadOptions(use_threads=False)
                pa.ipc.open_stream(file, options=options).read_all().validate(full=True)
        except (pa.ArrowException, OSError) as error:
            problem = f"{path}: {error}"
        sender.send(problem)


def is_list_of_pictures(feature: object) -> bool:
    """Whether a column of this type holds lists of pictures."""
    return isinstance(feature, List) and isinstance(feature.feature, Image)


def with_undecoded_pictures(rows: Dataset, folder: Path) -> Dataset:
    """`images` as lists of `{"bytes", "path"}`: the library would open them by other rules than `open_picture`.

    Pictures that are stored once, in the dataset's `folder`, come with their bytes like any other.

    Raises ValueError where a row holds a single picture, not a list.
    """
    feature = rows.features["images"]
    if not isinstance(feature, List) and feature != Value("null"):
        raise ValueError(
            f"images is {feature}, expected a list of pictures in each row: write [picture], or prepare the data with "
            "data_prep/prepare_conversations.py"
        )
    if not is_list_of_pictures(feature):
        return rows.cast_column("images", List(Image(decode=False)))
    return with_stored_pictures(rows, folder)


def open_split(dataset: DatasetDict, split: str, name: str) -> Dataset:
    """One split with at least one row; each row knows its number in the split (`row`), to be named by."""
    if split not in dataset or not len(dataset[split]):
        sizes = ", ".join(f"{key} ({len(rows)})" for key, rows in dataset.items())
        raise ValueError(f"{name}: no rows in split {split!r}; there are {sizes}")
    rows = dataset[split]
    rows = rows.add_column("row", range(len(rows))) if "row" not in rows.column_names else rows
    rows.info.dataset_name = name
    return rows


def describe_rows(rows: Dataset) -> str:
    """`data/cctv, split train`, as far as rows know where they are from."""
    return ", ".join(filter(None, (rows.info.dataset_name, f"split {rows.split}" if rows.split else "")))


def refuse_pictures(rows: Dataset, name: str) -> None:
    """Raise ValueError for rows with pictures, which a training on text would leave out."""
    if (
        "images" in rows.column_names
        and pc.any(pc.greater(pc.list_value_length(rows.data.column("images")), 0)).as_py()
    ):
        raise ValueError(
            f"{name}: these rows have pictures, which train_gemma.py does not show: train them with scripts/train_llava.py and a "
            "model that sees, or prepare rows of text"
        )


def open_validation(
    dataset: DatasetDict, script_args: "ScriptArguments", training_args: "TrainingArguments"
) -> Dataset | None:
    """The split to evaluate on while training, or None, and then no evaluation: `--split ordered` holds none back."""
    split = script_args.dataset_validation_split
    if split in dataset and len(dataset[split]):
        return open_split(dataset, split, script_args.dataset_name)
    if training_args.eval_strategy != "no":
        from transformers import IntervalStrategy  # the Trainer comes with it

        PartialState().print(
            f"{script_args.dataset_name}: no rows in split {split!r}, so nothing is evaluated while training"
        )
        training_args.eval_strategy = IntervalStrategy.NO
    return None


def load_wording(dataset_name: str) -> dict[str, Any] | None:
    """The sentences that `prepare_anime.py` wrote answers with, from the dataset's manifest; None for other datasets."""
    manifest = Path(dataset_name) / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("wording") if manifest.is_file() else None


def spread(rows: Dataset, number: int) -> Dataset:
    """At most `number` rows, evenly spaced: consecutive frames of a video would all show the same scene."""
    if len(rows) <= number:
        return rows
    return rows.select([round(position * (len(rows) - 1) / max(number - 1, 1)) for position in range(number)])
