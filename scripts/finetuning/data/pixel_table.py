"""Pixels rescaled and normalised by a table of the 256 values that a byte has, one row a colour.

transformers' processor without torchvision does it in floats, several arrays a picture: at 560x560 seven eighths of what a
loader process does for a row. The table is the processor's own answer to all bytes, so the pixels are the same bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor


def pixel_values(processor: BaseImageProcessor, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What a LLaVA's image processor makes of RGB pictures: `pixel_values` (pictures, 3, height, width)."""
    table = make_table(processor)
    if table is None:
        return dict(processor(list(pictures), return_tensors="pt"))
    as_bytes = processor(list(pictures), do_rescale=False, do_normalize=False)["pixel_values"]
    if any(one.dtype != np.uint8 for one in as_bytes):
        return dict(processor(list(pictures), return_tensors="pt"))
    values = np.empty((len(as_bytes), *as_bytes[0].shape), table.dtype)
    for place, picture in enumerate(as_bytes):
        for colour, of_byte in enumerate(table):
            np.take(of_byte, picture[colour], out=values[place, colour], mode="clip")
    return {"pixel_values": torch.from_numpy(values)}


def make_table(processor: BaseImageProcessor) -> np.ndarray | None:
    """(3, 256): what each byte of each colour becomes; None where the processor leaves bytes as they are, or works on tensors."""
    if not (processor.do_rescale and processor.do_normalize):
        return None
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    as_they_are = {name: False for name in ("do_resize", "do_center_crop", "do_pad")}
    values: Tensor | np.ndarray = processor([Image.fromarray(every_byte)], **as_they_are)["pixel_values"][0]
    if not isinstance(values, np.ndarray):
        return None
    return values.reshape(3, 256)
