"""Pixels by a table of bytes are those of the processor itself, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor

from finetuning.data.pixel_table import make_table, pixel_values

SQUARE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Noise of these (width, height)."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


@pytest.mark.parametrize(
    "processor",
    [
        LlavaImageProcessor(do_pad=True, **SQUARE),
        LlavaImageProcessor(do_pad=False, **SQUARE),
        LlavaImageProcessor(do_pad=True, image_mean=[0.5, 0.2, 0.1], image_std=[0.5, 1.0, 2.0], **SQUARE),
        LlavaImageProcessor(do_normalize=False, **SQUARE),
        CLIPImageProcessor(**SQUARE),
    ],
    ids=["padded", "cut", "colours of their own", "only rescaled", "CLIP's"],
)
def test_pixels_are_the_processors_own(processor):
    given = pictures((28, 28), (60, 31), (20, 45))
    assert torch.equal(
        pixel_values(processor, given)["pixel_values"], processor(given, return_tensors="pt")["pixel_values"]
    )


def test_the_table_is_used_where_bytes_become_floats():
    assert make_table(LlavaImageProcessor(do_pad=True, **SQUARE)).shape == (3, 256)
    assert make_table(LlavaImageProcessor(do_normalize=False, **SQUARE)) is None
