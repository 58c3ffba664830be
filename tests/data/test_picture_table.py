"""Each picture is stored once, and rows look as if they held it: here, in another process, in another folder."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import must_run
from datasets import Dataset, load_from_disk
from PIL import Image
from push_to_hub import write_parquet

from finetuning.arguments import ScriptArguments
from finetuning.data.dataset import describe_damage, open_dataset, open_split
from finetuning.data.label_audit import undecoded
from finetuning.data.mixture import mix, open_mixed_in
from finetuning.data.picture_table import FILE
from support.raw_data import with_pictures

pytestmark = pytest.mark.slow  # a second for the dataset that all read


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """30 frames of 30 kB, each asked about three times: `frames/` and `data/`."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "frames").mkdir()
    for number in range(30):
        noise = np.random.default_rng(number).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "frames" / f"seq_{number:06}.png")
    (folder / "labels.csv").write_text("id,count\n" + "".join(f"{n},{n % 7}\n" for n in range(30)), encoding="utf-8")
    asked = "\n".join(f"USER: Question {n}?\nASSISTANT: {{count}} people.\n" for n in range(3))
    (folder / "messages.txt").write_text(asked, encoding="utf-8")
    words = [
        word for name in ("frames", "labels.csv", "messages.txt") for word in (f"--{name.split('.')[0]}", folder / name)
    ]
    must_run(
        "data_prep/prepare_cctv.py", *words, "--output", folder / "data", "--gap", "2", "--questions_per_frame", "all"
    )
    return folder


@pytest.fixture
def moved(prepared, tmp_path) -> Path:
    """The dataset in another folder."""
    return Path(shutil.copytree(prepared / "data", tmp_path / "elsewhere"))


def is_as_its_file(row: dict, folder: Path) -> bool:
    (image,) = row["images"]
    name = image["path"][-len("seq_000000.png") :]  # what is prepared again has the row before it
    return image["bytes"] == (folder / "frames" / name).read_bytes()


def test_pictures_take_little_more_than_their_bytes(prepared):
    rows = open_dataset(str(prepared / "data"), vision=True)
    names = {row["images"][0]["path"] for split in rows.values() for row in split}
    pictures = sum((prepared / "frames" / name).stat().st_size for name in names)
    stored = sum(path.stat().st_size for path in (prepared / "data").rglob("*") if path.is_file())
    assert sum(map(len, rows.values())) == 3 * len(names) > 60
    assert stored < 1.05 * pictures


def test_rows_hold_their_pictures_wherever_they_are_read(prepared, moved):
    rows = open_split(open_dataset(str(moved), vision=True), "train", str(moved))
    assert rows.column_names == ["messages", "images", "image_id", "count", "id", "row"]
    assert all(is_as_its_file(row, prepared) for row in rows)
    assert is_as_its_file({"images": rows["images"][5]}, prepared)
    assert is_as_its_file(undecoded(rows, [7])[0], prepared)
    # As in a loader process that was not forked from this one.
    assert is_as_its_file(pickle.loads(pickle.dumps(rows.select([4, 2])))[1], prepared)
    sizes = rows.map(lambda row: {"size": len(row["images"][0]["bytes"])}, keep_in_memory=True)["size"]
    assert min(sizes) > 20_000


def test_a_damaged_picture_is_found_before_it_is_used(moved):
    file = moved / FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "pictures" in describe_damage(moved)


def test_sets_with_and_without_a_table_train_together(prepared, moved, tmp_path):
    held = tmp_path / "held"
    with_pictures(moved).save_to_disk(held)
    script_args = ScriptArguments(dataset_name=str(prepared / "data"), dataset_mixer={str(moved): 1, str(held): 0.5})
    own = open_split(open_dataset(str(prepared / "data"), vision=True), "train", "own")
    rows = mix(own, open_mixed_in(script_args, vision=True, seed=1), script_args)
    assert len(rows) == 2 * len(own) + round(len(own) / 2)
    assert all(is_as_its_file(row, prepared) for row in rows)


def test_a_prepared_dataset_is_prepared_again(prepared, moved):
    words = ("--input", moved, "--input_split", "train", "--output", moved / "again", "--validation_size", "0")
    must_run("data_prep/prepare_conversations.py", *words, "--test_size", "0")
    again = open_dataset(str(moved / "again"), vision=True)["train"]
    assert len(again) == len(load_from_disk(moved)["train"]) and all(is_as_its_file(row, prepared) for row in again)


def test_who_has_the_library_alone_reads_what_is_uploaded(prepared, tmp_path):
    write_parquet(prepared / "data", tmp_path / "upload")
    (file,) = (tmp_path / "upload" / "data").glob("train-*")
    row = Dataset.from_parquet(str(file), cache_dir=str(tmp_path))[8]
    assert row["images"][0].size == (100, 100) and row["messages"][0]["content"].startswith("Question")
