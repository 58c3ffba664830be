"""A picture that does not decode is named with its dataset, split and row, or passed over with the next row in its place."""

import faulthandler
import io
import json
import os
import signal
from contextlib import suppress

import check_data
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo, PngStream

from finetuning.data.bad_rows import lost_reader_named, pass_over_bad_rows
from finetuning.data.dataset import open_dataset, open_split, with_undecoded_pictures
from finetuning.data.pictures import PictureError, open_pictures
from finetuning.training.trainer import rows_named
from support.raw_data import draw
from support.training import train


@pytest.fixture
def splits(tmp_path) -> DatasetDict:
    """Twelve rows to train on, of which 3, 4 and 11 hold no whole picture, and two to validate."""
    whole = [draw(tmp_path / f"{number}.png", number).read_bytes() for number in range(14)]
    pictures = [data[:60] if number in (3, 4, 11) else data for number, data in enumerate(whole)]
    features = Features(
        {"messages": List({"role": Value("string")}), "images": List(Image(decode=False)), "name": Value("string")}
    )

    def rows(numbers: range, split: str) -> Dataset:
        values = [
            {"messages": [], "images": [{"bytes": pictures[n], "path": f"{n}.png"}], "name": str(n)} for n in numbers
        ]
        return with_undecoded_pictures(Dataset.from_list(values, features=features, split=split), tmp_path)

    return DatasetDict({"train": rows(range(12), "train"), "validation": rows(range(12, 14), "validation")})


def test_at_most_so_many_rows_are_passed_over_and_the_next_stands_in(splits):
    train, validation = (open_split(splits, name, "data/cctv") for name in ("train", "validation"))
    kept, kept_validation, bad = pass_over_bad_rows(3, train, validation)
    assert kept["name"] == ["0", "1", "2", "5", "5", "5", "6", "7", "8", "9", "10", "0"]
    assert kept_validation["name"] == ["12", "13"] and len(kept) == len(train)
    assert [(row["split"], row["row"], row["picture"]) for row in bad] == [
        ("train", number, f"picture 1 ({number}.png)") for number in (3, 4, 11)
    ]
    assert kept._indices is None  # else adding a column would copy all pictures
    with pytest.raises(
        ValueError, match=r"(?s)data/cctv, split train: more rows than skip_bad_rows: 2.*row 11, picture 1"
    ):
        pass_over_bad_rows(2, train, validation)


def test_an_error_of_a_row_gets_the_dataset_and_the_split(splits):
    rows = open_split(splits, "train", "data/cctv")
    with (
        pytest.raises(ValueError, match=r"^data/cctv, split train, row 3, picture 1: bad\. .*--skip_bad_rows 1"),
        rows_named(rows),
    ):
        raise ValueError("row 3, picture 1: bad")
    with pytest.raises(ValueError, match=r"^something else$"), rows_named(rows):
        raise ValueError("something else")


def ends_a_process(monkeypatch) -> bytes:
    """A picture in which Pillow's decoder, as it is replaced here, finds what it dies of."""

    def die(*_) -> None:
        faulthandler.disable()  # pytest's, which would print where
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(PngStream, "chunk_tEXt", die)
    note, file = PngInfo(), io.BytesIO()
    note.add_text("any", "thing")
    PillowImage.linear_gradient("L").save(file, "PNG", pnginfo=note)
    return file.getvalue()


class Opens:
    """An auditor that opens pictures, and notes nothing."""

    split = "train"

    def __call__(self, rows: list[dict]) -> list:
        for row in rows:
            with suppress(PictureError):
                open_pictures(row["images"])
        return []


@pytest.mark.slow
def test_a_picture_that_takes_its_reader_with_it_is_named(splits, monkeypatch):
    train, validation = (open_split(splits, name, "data/cctv") for name in ("train", "validation"))
    images = list(train["images"])
    images[7] = [images[7][0], {"bytes": ends_a_process(monkeypatch), "path": "dies.png"}]
    train = train.remove_columns("images").add_column("images", images, feature=List(Image(decode=False)))
    named = (
        r"data/cctv, split train, row 7, picture 2 \(dies\.png\): a process that opens it is ended by SIGSEGV\. Replace"
    )
    with pytest.raises(ValueError, match=named):
        pass_over_bad_rows(3, train, validation)
    with pytest.raises(ValueError, match=named):
        check_data.audit_rows(Opens(), train, 1)


def test_a_reader_that_was_killed_without_a_picture_to_blame_is_said_with_its_rows(splits):
    train = open_split(splits, "train", "data/cctv")
    lost = "DataLoader worker (pid 71) is killed by signal: Killed."
    with (
        pytest.raises(ValueError, match=r"^data/cctv, split train: .* ended by Killed while rows 4 to 11 were in work"),
        lost_reader_named(train, lambda: range(4, 64)),
    ):
        raise RuntimeError(lost)
    with pytest.raises(RuntimeError, match="else"), lost_reader_named(train, lambda: range(4)):
        raise RuntimeError("something else")


def test_a_training_names_the_row_and_passes_over_it_when_told_to(tiny_llava, cctv_dataset, tmp_path):
    rows = open_dataset(str(cctv_dataset), vision=True)["train"]
    images = list(rows["images"])
    # Behind the rows that are looked at before weights are loaded.
    images[12][0]["bytes"] = images[12][0]["bytes"][:200]
    damaged = rows.remove_columns("images").add_column("images", images, feature=List(Image(decode=False)))
    DatasetDict({"train": damaged}).save_to_disk(str(tmp_path / "data"))
    flags = ("--per_device_train_batch_size", str(len(rows)), "--max_steps", "1", "--dataloader_num_workers", "1")
    with pytest.raises(ValueError, match=r"data, split train, row 12, picture 1 \(.*\): .*--skip_bad_rows 1"):
        train(tiny_llava, tmp_path / "data", tmp_path / "run", *flags)
    train(tiny_llava, tmp_path / "data", tmp_path / "run", *flags, "--skip_bad_rows", "1")
    skipped = json.loads((tmp_path / "run" / "skipped_rows.json").read_text())["rows"]
    assert [(row["split"], row["row"]) for row in skipped] == [("train", 12)]
