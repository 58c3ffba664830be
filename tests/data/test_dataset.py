"""Folders of JSON lines as training opens them: pictures as lists of files' bytes or paths, none read before its row."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from finetuning.data.collator import with_pictures
from finetuning.data.dataset import open_dataset, refuse_pictures

MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7"}]


def opened(folder, *images) -> list[int]:
    """The number of pictures of each row of a folder whose rows hold `images`."""
    folder.mkdir()
    rows = [json.dumps({"messages": MESSAGES, "images": of_row}) for of_row in images]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return [len(with_pictures(row)["images"]) for row in open_dataset(str(folder), vision=True)["train"]]


def test_rows_of_json_lines_with_and_without_pictures(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    assert opened(tmp_path / "mixed", [], [name], None, [name, name]) == [0, 1, 0, 2]
    assert opened(tmp_path / "empty", [], []) == [0, 0]
    assert opened(tmp_path / "nulls", None, None) == [0, 0]
    assert opened(tmp_path / "objects", [{"path": name, "bytes": None}]) == [1]
    with pytest.raises(ValueError, match=r"images is Value\('string'\), expected a list of pictures in each row"):
        opened(tmp_path / "single", name)
    with pytest.raises(ValueError, match=r"row \(unnumbered\), picture 1: .*none\.png: no such file"):
        opened(tmp_path / "missing", [str(tmp_path / "none.png")])


def test_pictures_are_not_left_out_of_a_training_on_text():
    with_pictures, without = ([[{"bytes": b"x", "path": None}], []], [[], []])
    rows = [Dataset.from_dict({"messages": ["a", "b"], "images": images}) for images in (with_pictures, without)]
    with pytest.raises(ValueError, match=r"data/x: these rows have pictures, which train_gemma\.py does not show"):
        refuse_pictures(rows[0], "data/x")
    refuse_pictures(rows[1].select_columns(["messages"]), "data/x")
