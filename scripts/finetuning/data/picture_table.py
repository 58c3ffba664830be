"""Pictures of a prepared dataset, each stored once however many rows show it.

A dataset's Image column holds a picture's bytes in every row that shows it (findings/datasets-shared-picture.sh). Here
`pictures/` beside the splits is a table of bytes, and a row names its pictures by number: `{"bytes": null, "path":
"pictures/12/seq_000012.jpg"}`. `with_stored_pictures` gives rows as if the bytes were in them.

Standard library, datasets and pyarrow only: data preparation writes with this module, without PyTorch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.features.features import register_feature

PICTURES = "pictures"
FILE = f"{PICTURES}/data-00000-of-00001.arrow"


@dataclass
class StoredImage(Image):
    """An undecoded picture, `{"bytes", "path"}`, whose bytes may lie in the table of a dataset's folder.

    Args:
        folder: of the dataset; "" where rows name their table by an absolute path.
    """

    folder: str = ""
    _type: str = field(default="StoredImage", init=False, repr=False)

    def decode_example(self, value: dict[str, Any], token_per_repo_id: Any = None) -> dict[str, Any]:
        """What the column holds -> bytes and the picture's own name."""
        if value["bytes"] is not None or not value["path"]:
            return value
        *folder, pictures, number, name = Path(self.folder, value["path"]).parts
        if pictures != PICTURES or not number.isdecimal():
            return value
        return {"bytes": read_picture(str(Path(*folder)), int(number)), "path": name}


with warnings.catch_warnings():
    # "experimental", says datasets of a call that has not changed since 3.0. A mapped dataset's file names the class.
    warnings.simplefilter("ignore")
    register_feature(StoredImage, "StoredImage")


@cache
def open_table(folder: str) -> Dataset:
    """The pictures of the dataset in `folder`, mapped into memory."""
    return Dataset.from_file(str(Path(folder) / FILE))


def read_picture(folder: str, number: int) -> bytes:
    """The bytes of picture `number`."""
    return open_table(folder)[number]["bytes"]


def with_stored_pictures(rows: Dataset, folder: Path) -> Dataset:
    """`rows`, whose `images` come as `{"bytes", "path"}`, out of the table of `folder` where one is there.

    Nothing of the rows' own table changes; a cast would copy the split into a cache beside it.
    """
    stored = (folder / FILE).is_file()
    rows.info.features["images"] = List(StoredImage(folder=str(folder.resolve())) if stored else Image(decode=False))
    return rows


def with_absolute_names(rows: Dataset) -> Dataset:
    """`rows` that name their table by an absolute path, so that rows of several datasets can be joined."""
    feature = getattr(rows.features.get("images"), "feature", None)
    if not isinstance(feature, StoredImage):
        return rows
    rows = rows.with_format("arrow").map(
        partial(_name_absolutely, feature.folder), batched=True, keep_in_memory=True, desc="Naming pictures"
    )
    rows.info.features["images"] = List(StoredImage())
    return rows.with_format(None)


def _name_absolutely(folder: str, batch: pa.Table) -> pa.Table:
    place = batch.column_names.index("images")
    column = batch.column("images")
    lists = [
        images and [image | {"path": str(Path(folder, image["path"]))} if image["path"] else image for image in images]
        for images in column.to_pylist()
    ]
    return batch.set_column(place, "images", pa.array(lists, column.type))


def size_of_pictures(rows: Dataset) -> int:
    """Bytes that the pictures of `rows` would add to them, each as often as it is shown; about, from their mean."""
    feature = getattr(rows.features.get("images"), "feature", None)
    if not isinstance(feature, StoredImage):
        return 0
    table = open_table(feature.folder)
    shown = pc.sum(pc.list_value_length(rows.data.column("images"))).as_py() or 0
    return round(table.data.nbytes / len(table) * shown)


def with_bytes(rows: Dataset) -> Dataset:
    """`rows` with the bytes of their pictures in them, for who reads them without this module; held in memory."""
    if not isinstance(getattr(rows.features.get("images"), "feature", None), StoredImage):
        return rows
    features = rows.features | {"images": List(Image())}
    return rows.map(
        lambda batch: {"images": batch["images"]},
        batched=True,
        batch_size=100,
        features=Features(features),
        keep_in_memory=True,
        desc="Pictures into rows",
    )


class PictureWriter:
    """Writes a dataset's table of pictures, one after the other; `close` at the end.

    Args:
        folder: of the dataset; `pictures/` is made in it with the first picture.
        held: pictures that are held in memory before they go to disk.
    """

    def __init__(self, folder: Path, held: int):
        self.folder, self.held = folder, held
        self.numbers: dict[str, int] = {}
        self.writer: ArrowWriter | None = None

    def name(self, digest: str, name: str, read: Callable[[], bytes]) -> dict[str, Any]:
        """What a row holds of the picture; its bytes are read and stored when `digest`, their hash, is new."""
        if digest not in self.numbers:
            if self.writer is None:
                (self.folder / PICTURES).mkdir(parents=True)
                self.writer = ArrowWriter(
                    path=str(self.folder / FILE),
                    features=Features({"bytes": Value("binary")}),
                    writer_batch_size=self.held,
                )
            self.writer.write({"bytes": read()})
            self.numbers[digest] = len(self.numbers)
        return {"bytes": None, "path": f"{PICTURES}/{self.numbers[digest]}/{name}"}

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.finalize()
            self.writer.close()
