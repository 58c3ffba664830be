"""Raw pictures for preparation, and what preparation wrote, its ledger and counts checked against one another."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_from_disk
from PIL import Image


def draw(path: Path, seed: int, size: tuple[int, int] = (48, 36)) -> Path:
    """A picture that looks like no other: unrelated noise, coarse enough to survive JPEG and hashing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path)
    return path


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
    return load_from_disk(output), manifest, set(rejects)
