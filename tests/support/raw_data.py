"""Raw pictures for preparation, and what preparation wrote, its ledger and counts checked against one another."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_from_disk
from PIL import Image

from finetuning.data.picture_table import with_bytes, with_stored_pictures


def draw(path: Path, seed: int, size: tuple[int, int] = (48, 36)) -> Path:
    """A picture that looks like no other: unrelated noise, coarse enough to survive JPEG and hashing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def with_pictures(folder: Path | str) -> DatasetDict:
    """A prepared dataset as the library alone reads others: each row holds its pictures, which are decoded."""
    splits = load_from_disk(str(folder))
    return DatasetDict({name: with_bytes(with_stored_pictures(rows, Path(folder))) for name, rows in splits.items()})


def read_output(output: Path) -> tuple[DatasetDict, dict, set[tuple[str, str, str]]]:
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    with (output / "rejects.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rejects = [(Path(row["file"]).name, row["line"], row["reason"]) for row in rows]
    for counts in manifest["read"].values():
        assert counts["accepted"] + counts["rejected"] == counts["read"]
    assert sum(counts["rejected"] for counts in manifest["read"].values()) == len(rejects)
    assert manifest["reject_reasons"] == dict(Counter(reason for _, _, reason in rejects))
    assert len({(row["file"], row["line"], row["detail"].partition(": ")[0]) for row in rows}) == len(rows)
    opened = load_from_disk(output)
    has_images = "images" in next(iter(opened.values())).column_names
    return with_pictures(output) if has_images else opened, manifest, set(rejects)
