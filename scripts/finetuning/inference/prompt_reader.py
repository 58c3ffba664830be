"""Prompts made ready by loader processes: pictures decoded and preprocessed, dialogues tokenised, while the GPU answers."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from finetuning.data.collator import image_token_of, prompt_batch, tokenize, tokens_of_images
from finetuning.data.image_tiles import views_of
from finetuning.families import PICTURE_INPUTS

MOST_WORKERS = 4  # each reads 70 pictures a second; starting more keeps a large process waiting longer than they save
MOST_OF_GROUP = 16  # rows about one image that are computed together
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where loader processes leave tensors; only its size is read
GROUPS_A_FETCH = 4  # groups that a loader process hands over at once
SHORTEST_SHARED_PREFIX = 16  # tokens; a shorter one is not worth a segment of its own


@dataclass
class PromptGroup:
    """The prompts about one image: their common tokens, and each prompt's own, at least one each.

    `rows` are their numbers. A prompt alone is all prefix, and its own tokens are none. `pictures` is what the processor
    made of the pictures (`Family.picture_inputs`), each with an entry a picture; empty without any.
    """

    rows: list[int]
    prefix: Tensor
    own: list[Tensor]
    pictures: dict[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of the group: its prefix once, and what each row adds."""
        return len(self.prefix) + sum(map(len, self.own))

    def split(self) -> tuple["PromptGroup", "PromptGroup"] | None:
        """Two halves, each with the prefix; None for a prompt alone."""
        if len(self.rows) == 1:
            return None
        half = len(self.rows) // 2
        parts = (self.rows[:half], self.own[:half]), (self.rows[half:], self.own[half:])
        return tuple(PromptGroup(rows, self.prefix, own, self.pictures) for rows, own in parts)


class PromptReader:
    """Row numbers of groups -> `PromptGroup`s; the `collate_fn` of a DataLoader over row numbers.

    The tokens are those of `prompt_batch`, row by row. A mistake in a row comes back as a ValueError, not raised: raised
    in a loader process it would reach the user inside a stack trace.
    """

    def __init__(
        self,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        rows: Sequence[dict[str, Any]],
        dtype: torch.dtype = torch.float32,
    ):
        self.processing_class, self.rows, self.dtype = processing_class, rows, dtype

    def __call__(self, groups: list[list[int]]) -> list[PromptGroup] | ValueError:
        try:
            return [group for numbers in groups for group in self.read(numbers)]
        except ValueError as error:
            return error

    def read(self, numbers: list[int]) -> list[PromptGroup]:
        """The rows' prompts; those that begin alike up to behind all pictures are one group, any other is alone."""
        first = self.rows[numbers[0]]
        batch = prompt_batch(self.processing_class, [first])
        pictures = {name: batch[name] for name in PICTURE_INPUTS if name in batch}
        if pictures:
            # As the model would, and half as much to hand over.
            pictures["pixel_values"] = pictures["pixel_values"].to(self.dtype)
        prompts = {numbers[0]: batch["input_ids"][0]}
        for number in numbers[1:]:
            if not pictures:
                prompts[number] = prompt_batch(self.processing_class, [self.rows[number]])["input_ids"][0]
            else:
                prompts[number] = self.tokenize(self.messages_of(number), first["images"], prompts[numbers[0]])
        groups = []
        while prompts:
            rows = [number for number in prompts if self.begin_alike(next(iter(prompts.values())), prompts[number])]
            tokens = [prompts.pop(number) for number in rows]
            prefix = common_length(tokens) if len(rows) > 1 else len(tokens[0])
            own = [prompt[prefix:] for prompt in tokens] if len(rows) > 1 else []
            groups.append(PromptGroup(rows, tokens[0][:prefix], own, pictures))
        return groups

    def begin_alike(self, prompt: Tensor, other: Tensor) -> bool:
        """Whether their common beginning is worth a segment of its own, and holds all image tokens."""
        if prompt is other:
            return True
        common = common_length([prompt, other])
        vision = isinstance(self.processing_class, ProcessorMixin)
        image_token = image_token_of(self.processing_class) if vision else -1
        return common >= SHORTEST_SHARED_PREFIX and not any(
            (tokens[common:] == image_token).any() for tokens in (prompt, other)
        )

    def messages_of(self, number: int) -> list[dict[str, str]]:
        """Messages of a row; its picture is not decoded."""
        # A Dataset would decode the picture with the row.
        rows = self.rows
        return (
            rows.select_columns("messages")[number]["messages"]
            if isinstance(rows, Dataset)
            else rows[number]["messages"]
        )

    def tokenize(self, messages: list[dict[str, str]], images: list, first: Tensor) -> Tensor:
        """Token ids of a prompt about the pictures of the prompt `first`, which are not read again."""
        processor = self.processing_class
        images = images * views_of(processor)
        of_images = tokens_of_images(first, image_token_of(processor), len(images))
        return tokenize(processor, prepare_multimodal_messages(messages, images=images), of_images, prompt=True)[0]


def common_length(prompts: Sequence[Tensor]) -> int:
    """Tokens with which all prompts begin; at least one of each prompt is left over."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0][:shortest]
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts[1:]:
        same &= prompt[:shortest] == first
    return shortest if same.all() else int(same.int().argmin())


def image_ids_of(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """What says that rows are about the same image: their `image_id`, else each row's own number."""
    if isinstance(rows, Dataset):
        ids = list(rows["image_id"]) if "image_id" in rows.column_names else [None] * len(rows)
    elif isinstance(rows, list):
        ids = [row.get("image_id") for row in rows]
    else:
        ids = list(getattr(rows, "image_ids", [None] * len(rows)))
    return [("row", number) if image_id is None else image_id for number, image_id in enumerate(ids)]


def group_rows(image_ids: Sequence[Any], numbers: Sequence[int], most: int = MOST_OF_GROUP) -> list[list[int]]:
    """Row numbers with the same image id together, in the order of first appearance, at most `most` in a group."""
    groups: dict[Any, list[list[int]]] = {}
    for number in numbers:
        of_image = groups.setdefault(image_ids[number], [[]])
        if len(of_image[-1]) == most:
            of_image.append([])
        of_image[-1].append(number)
    return [group for of_image in groups.values() for group in of_image]


def cut_windows(image_ids: Sequence[Any], size: int) -> list[range]:
    """Row numbers in ranges of at most `size`, cut between two images where one is near."""
    windows = []
    start = 0
    while start < len(image_ids):
        stop = min(start + size, len(image_ids))
        if stop < len(image_ids):
            near = range(stop, max(start, stop - MOST_OF_GROUP), -1)
            stop = next((cut for cut in near if image_ids[cut] != image_ids[cut - 1]), stop)
        windows.append(range(start, stop))
        start = stop
    return windows


def read_prompts(
    reader: PromptReader, windows: Sequence[Sequence[list[int]]], num_workers: int | None = None
) -> Iterator[Iterator[PromptGroup]]:
    """For each window of groups an iterator over its prompts; loader processes read ahead over the windows' ends."""
    batches = [
        [groups[start : start + GROUPS_A_FETCH] for start in range(0, len(groups), GROUPS_A_FETCH)]
        for groups in windows
    ]
    fetches = [fetch for window in batches for fetch in window]
    has_pictures = bool(fetches) and has_images(reader.rows, fetches[0][0][0])
    workers = loader_processes(len(fetches), has_pictures) if num_workers is None else num_workers
    loader = DataLoader(
        fetches,
        batch_size=None,
        collate_fn=reader,
        num_workers=workers,
        prefetch_factor=read_ahead(workers, bytes_of_fetch(reader.processing_class)) if workers else None,
        pin_memory=False,
    )
    fetched = iter(loader)  # the processes start here

    def of_window(number: int) -> Iterator[PromptGroup]:
        for _ in range(number):
            groups = next(fetched)
            if isinstance(groups, ValueError):
                raise ValueError(str(groups))
            yield from groups

    return (of_window(len(window)) for window in batches)


def has_images(rows: Sequence[dict[str, Any]], number: int) -> bool:
    """Whether a row has pictures."""
    if isinstance(rows, Dataset):
        return "images" in rows.column_names
    return bool(rows[number].get("images"))


def loader_processes(num_fetches: int, has_pictures: bool) -> int:
    """None where starting them costs more than they save: for text, and for a few pictures."""
    if not has_pictures or num_fetches < 4:
        return 0
    return max(0, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1, num_fetches // 2))


def bytes_of_fetch(processor: ProcessorMixin) -> int:
    """The most that a fetch with one picture a group takes, in fp32: its one view, and the tiles of the largest grid."""
    pictures = processor.image_processor
    size = pictures.size if isinstance(pictures.size, dict) else vars(pictures.size)
    side = max(value for value in size.values() if value)
    grids = getattr(pictures, "image_grid_pinpoints", None) or []
    views = 1 + max((height * width // side**2 for height, width in grids), default=0)
    return GROUPS_A_FETCH * views * 3 * side**2 * 4


def read_ahead(workers: int, fetch: int) -> int:
    """Fetches, of `fetch` bytes, that each process keeps ready: enough for one large batch, within half of the shared memory."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        free = 2**30
    return max(1, min(16, free // 2 // fetch // workers))
