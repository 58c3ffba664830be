"""What was read for a CCTV dataset, each with its first problem: labels, frames, dialogues, marks of annotation tools."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from preparing.ledger import Ledger


@dataclass(eq=False)
class Item:
    """Something that was read and must be accounted for; the first problem found is the one reported."""

    file: str
    line: int | None
    problem: tuple[str, str] | None = field(default=None, init=False)

    def reject(self, reason: str, detail: str) -> None:
        """Note why the item is left out; the first reason stays."""
        self.problem = self.problem or (reason, detail)

    @property
    def where(self) -> str:
        """File and line, as `labels.csv:3`."""
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(eq=False)
class Label(Item):
    key: str  # frame number or file name, as written
    values: dict[str, str]  # what templates may use: every column, count as a plain number
    count: int = -1
    frame: "Frame | None" = None
    video: str = ""  # the video that another column names, "" for none
    differing: set[str] = field(default_factory=set)  # columns that other rows of the same frame fill in differently


@dataclass(eq=False)
class Frame(Item):
    image_id: str  # path inside the frames folder
    path: Path
    folder: str  # inside the frames folder, "." for itself
    video: str  # the folder, or a part of it that the file names tell
    time: int = 0  # frame number in the file name; its place in the video where numbers are missing or repeat
    number: int | None = None  # by which a label may name it
    dated: bool = False  # whether its name holds the day
    label: Label | None = None
    sha256: str = ""
    difference_hash: bytes = b""


@dataclass(eq=False)
class Dialogue(Item):
    messages: list[dict[str, str]]  # with placeholders
    image: str | None  # the only frame it is for
    frame: Frame | None = None
    fields: list[set[str]] = field(default_factory=list)  # placeholders of each message


def settle(ledger: Ledger, kind: str, items: Iterable[Item]) -> None:
    """Enter items into the ledger: read, and accepted or rejected."""
    for item in items:
        ledger.read(kind)
        if item.problem:
            ledger.reject(kind, item.file, item.line, *item.problem)
        else:
            ledger.accept(kind)
