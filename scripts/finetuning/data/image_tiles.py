"""`image_tiles`: a picture and its tiles, as several pictures of one row, for models that see a picture in one small view.

With 3x2 (columns x rows) a row's picture becomes seven: the whole picture, then its tiles from left to right, the upper row
first. Neighbouring tiles share a tenth of their side, so that whoever stands at a border is whole in one of them. The whole
picture comes first, so nothing is cut away from the row. The setting lies in the processor's picture settings, and is saved
and read with them: training, evaluation and answers see the same.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # plans count tiles without opening a picture
    from PIL import Image

OVERLAP = 0.1  # of a tile's side
MOST = 16  # tiles


def parse_tiles(text: str | None) -> tuple[int, int] | None:
    """ "3x2" -> (3, 2), columns and rows; None for "1x1" and for None. Raises ValueError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9])x([1-9])", text)
    columns, rows = map(int, match.groups()) if match else (0, 0)
    if not 1 <= columns * rows <= MOST:
        raise ValueError(f"image_tiles: {text}, expected COLUMNSxROWS of at most {MOST} tiles, such as 2x2 or 3x2")
    return (columns, rows) if columns * rows > 1 else None


def tiles_of(processor: Any) -> tuple[int, int] | None:
    """(columns, rows) of a processor's tiles; None where a picture is one view, and for a tokenizer."""
    return parse_tiles(getattr(getattr(processor, "image_processor", None), "image_tiles", None))


def views_of(processor: Any) -> int:
    """As how many pictures each picture of a row is shown."""
    return num_views(tiles_of(processor))


def num_views(tiles: tuple[int, int] | None) -> int:
    """The whole picture, and each of its tiles."""
    return 1 if tiles is None else 1 + tiles[0] * tiles[1]


def tile_boxes(size: tuple[int, int], tiles: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """(left, upper, right, lower) in pixels of each tile of a picture of `size` (width, height), row by row."""
    spans = []
    for length, number in zip(size, tiles, strict=True):
        side = length / (number - (number - 1) * OVERLAP)
        starts = [place * (length - side) / max(number - 1, 1) for place in range(number)]
        # A picture of a few pixels has tiles of one pixel.
        spans.append([(min(round(start), length - 1), max(round(start + side), round(start) + 1)) for start in starts])
    columns, rows = spans
    return [(left, upper, min(right, size[0]), min(lower, size[1])) for upper, lower in rows for left, right in columns]


def with_tiles(pictures: "Sequence[Image.Image]", tiles: tuple[int, int] | None) -> "list[Image.Image]":
    """Each picture followed by its tiles."""
    if tiles is None:
        return list(pictures)
    return [view for one in pictures for view in (one, *(one.crop(box) for box in tile_boxes(one.size, tiles)))]
