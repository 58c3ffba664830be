"""Training pictures changed at random in ways that keep their answers true: mirrored, lighter, blurred, moved.

Nothing is ever cut off: a crop would cut people, and the count with them. What a picture gets follows from the seed, the
epoch and the row, so that a resumed run sees what the uninterrupted one would have seen. Validation, evaluation and
answers see pictures as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from PIL import Image, ImageEnhance, ImageFilter, ImageStat
from torch.utils.data import DataLoader

from finetuning import upstream
from finetuning.data.collator import with_pictures

KINDS = ("flip", "brightness", "blur", "shift")
BRIGHTNESS = 0.2  # lighter or darker by this share at most
BLUR = 0.003  # of the shorter side: the largest standard deviation
SHIFT = 0.05  # the whole picture is smaller by this share at most
# Words that a mirrored picture makes untrue; "right" as "correct" is among them, which costs a message and no label.
SIDES = (
    r"(?i)\b(left|right)(most|wards?|hand|handed)?\b|\b(anti|counter)?-?clockwise\b"
    r"|왼(쪽|편|손|팔|발|다리)|오른(쪽|편|손|팔|발|다리)|좌측|우측|좌우|좌회전|우회전|좌상|좌하|우상단|우하단|시계 ?방향"
)


def augment(picture: Image.Image, kinds: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """The RGB picture changed by the `kinds` of KINDS, of the same size and with everything in it that it showed."""
    if "flip" in kinds and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "brightness" in kinds:
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    if "blur" in kinds and rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR) * min(picture.size)))
    if "shift" in kinds:
        width, height = picture.size
        scale = rng.uniform(1 - SHIFT, 1)
        smaller = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
        mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
        whole = Image.new("RGB", picture.size, mean)
        left, top = rng.integers(width - smaller.width + 1), rng.integers(height - smaller.height + 1)
        whole.paste(smaller, (int(left), int(top)))
        picture = whole
    return picture


class AugmentedPictures:
    """A collator of training batches that gets each row's pictures changed by `augment`.

    `epoch` is shared with loader processes; `TellingSampler` sets it before the first row of an epoch is read.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], kinds: Sequence[str], seed: int):
        self.collate, self.kinds, self.seed = collate, kinds, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collate([self.augmented(example) for example in examples])

    def augmented(self, example: dict[str, Any]) -> dict[str, Any]:
        """The row with its pictures open and changed. Raises ValueError that names row and picture."""
        opened = with_pictures(example)["images"]
        rng = np.random.default_rng([self.seed, int(self.epoch), example.get("row", 0)])
        return example | {"images": [augment(picture, self.kinds, rng) for picture in opened]}


@upstream.overrides
class TellingSampler(SeedableRandomSampler):
    """accelerate's sampler, which tells a collator the epoch whose rows it begins to draw."""

    told: torch.Tensor

    def __iter__(self):
        self.told.fill_(self.epoch)
        yield from super().__iter__()


def augment_batches(loader: DataLoader, kinds: Sequence[str], seed: int) -> None:
    """Let a training loader change its pictures; in place, before `read_next_epoch_ahead`.

    Loader processes read rows of one epoch at a time: the next one's are asked for when this one's last batch is there.
    Raises ValueError for a loader whose order does not follow from the number of the epoch.
    """
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # accelerate's part of each process
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, SeedableRandomSampler):
        raise ValueError(
            "image_augmentation draws by the number of the epoch, which this order of rows does not tell: set "
            "train_sampling_strategy: random and leave accelerator_config's use_seedable_sampler on, or remove it"
        )
    collate = AugmentedPictures(loader.collate_fn, kinds, seed)
    upstream.replace(loader, "collate_fn", collate)
    upstream.replace(sampler, "__class__", TellingSampler)
    sampler.told = collate.epoch


def names_sides(rows: Dataset) -> tuple[int, str] | None:
    """(number, text) of the first row whose question or answer speaks of left or right; None without any."""
    dialogues = rows.with_format("arrow")[:]["messages"]
    if isinstance(dialogues, pa.ChunkedArray):
        dialogues = dialogues.combine_chunks()
    texts = pc.struct_field(dialogues.flatten(), "content")
    found = pc.index(pc.match_substring_regex(texts, SIDES), True).as_py()
    if found < 0:
        return None
    row = int(pc.list_parent_indices(dialogues)[found].as_py())
    return row, texts[found].as_py()
