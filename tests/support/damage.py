"""Damage to files: bits flipped, ends cut off, files gone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACES = 5  # of each file


def damages(path: Path, places: int = PLACES) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, what is then in the file) for a file: bits flipped and ends cut off at `places` places; None: gone."""
    whole, draw = path.read_bytes(), random.Random(path.name)
    yield "missing", None
    for place in sorted({0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(places - 2))} if whole else ()):
        bit = draw.randrange(8)
        yield f"bit {bit} of byte {place}", whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        if path.suffix != ".json" or whole[place:].strip():  # JSON without its last line break is what it was
            yield f"cut at byte {place}", whole[:place]


@contextmanager
def damaged(path: Path, contents: bytes | None) -> Iterator[None]:
    """The file with other contents, or gone, and as it was afterwards."""
    before = path.read_bytes()
    if contents is None:
        path.unlink()
    else:
        path.write_bytes(contents)
    try:
        yield
    finally:
        path.write_bytes(before)


def all_files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
