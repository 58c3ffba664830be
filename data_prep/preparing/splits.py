"""Who goes into train, validation and test, and who stands between them so that nothing leaks."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

PAIRS_HELD = 4_000_000

Item = TypeVar("Item")
Splits = dict[str, list[Item]]


def split_sizes(number: int, validation_size: float, test_size: float) -> tuple[int, int]:
    """How many of `number` items the two shares are: nearest whole number, at least one unless the share is 0."""
    sizes = [max(1, round(number * share)) if share else 0 for share in (validation_size, test_size)]
    return sizes[0], sizes[1]


def split_into_blocks(
    items: Sequence[Item], validation_size: float, test_size: float, gap: int
) -> tuple[Splits, list[Item]]:
    """Cuts one video, in order of time, into train, validation and test; also returns the `gap` items left out at
    each cut. Raises ValueError when the video is too short for that."""
    num_validation, num_test = split_sizes(len(items), validation_size, test_size)
    gap_before_validation = gap if num_validation else 0
    gap_before_test = gap if num_test else 0
    num_train = len(items) - num_validation - num_test - gap_before_validation - gap_before_test
    if num_train < 1:
        raise ValueError(
            f"{len(items)} usable frames are too few for {num_validation} validation and {num_test} test frames with "
            f"a gap of {gap} before each: give more frames, or a smaller --gap, --validation_size or --test_size"
        )
    start_validation = num_train + gap_before_validation
    end_validation = start_validation + num_validation
    start_test = end_validation + gap_before_test
    splits = {
        "train": list(items[:num_train]),
        "validation": list(items[start_validation:end_validation]),
        "test": list(items[start_test:]),
    }
    return splits, [*items[num_train:start_validation], *items[end_validation:start_test]]


def split_videos(
    videos: Mapping[str, Sequence[Item]], validation_size: float, test_size: float, gap: int, seed: int
) -> tuple[Splits, list[Item], int]:
    """(splits, items left out in gaps, number of videos that went whole to one side).

    Each video is cut into blocks of time. One that is too short for it, or of which less would be left to train than the
    gaps take, goes whole to one side, if there are as many videos as splits. Raises ValueError naming every video that is
    too short where there are not.
    """
    splits: Splits = {"train": [], "validation": [], "test": []}
    wanted = 1 + (validation_size > 0) + (test_size > 0)
    in_gap: list[Item] = []
    short: list[Sequence[Item]] = []
    too_short = []
    for name, items in videos.items():
        try:
            blocks, gaps = split_into_blocks(items, validation_size, test_size, gap)
        except ValueError as error:
            too_short.append(f"{name}: {error}")
            short.append(items)
            continue
        if len(blocks["train"]) <= len(gaps) and len(videos) >= wanted:
            short.append(items)
            continue
        in_gap += gaps
        for split, block in blocks.items():
            splits[split] += block
    if too_short and len(videos) < wanted:
        raise ValueError("\n".join(too_short))
    if short:
        fill = all(not items for items in splits.values())
        for split, items in split_whole(short, validation_size, test_size, seed, fill=fill).items():
            splits[split] += items
    return splits, in_gap, len(short)


def split_whole(
    groups: Sequence[Sequence[Item]], validation_size: float, test_size: float, seed: int, *, fill: bool
) -> Splits:
    """Shuffles groups that must stay together and fills test, then validation, then train, up to their shares.

    `fill`: a split that would stay empty, because every group is larger than its share, gets the smallest group of train.
    """
    num_validation, num_test = split_sizes(sum(map(len, groups)), validation_size, test_size)
    sides: dict[str, list[Sequence[Item]]] = {"train": [], "validation": [], "test": []}
    for group in random.Random(seed).sample(groups, len(groups)):
        room = {"test": num_test, "validation": num_validation}
        fitting = [name for name, size in room.items() if sum(map(len, sides[name])) + len(group) <= size]
        sides[fitting[0] if fitting else "train"].append(group)
    for name, size in {"test": num_test, "validation": num_validation}.items():
        if fill and size and not sides[name] and len(sides["train"]) > 1:
            sides[name].append(
                sides["train"].pop(min(range(len(sides["train"])), key=lambda n: len(sides["train"][n])))
            )
    # In the order in which they came: a video's frames in order of time.
    places = {id(group): place for place, group in enumerate(groups)}
    return {
        name: [item for group in sorted(of_side, key=lambda group: places[id(group)]) for item in group]
        for name, of_side in sides.items()
    }


def split_in_order(items: Sequence[Item], num_train: int, num_validation: int, gap: int) -> tuple[Splits, list[Item]]:
    """The first `num_train` items to learn from, all others to test on, as published protocols have it.

    Validation comes out of the end of the items to learn from, with `gap` items left out before it, so that the test
    split stays the published one: train then has `num_train - num_validation - gap` items.
    """
    gap = gap if num_validation else 0
    num_left = num_train - num_validation - gap
    if num_left < 1 or num_train >= len(items):
        raise ValueError(
            f"--train {num_train} of {len(items)} usable frames, with --validation {num_validation} and --gap {gap}, "
            f"leaves {num_left} to train on and {len(items) - num_train} to test on: both must be at least 1"
        )
    splits = {
        "train": list(items[:num_left]),
        "validation": list(items[num_left + gap : num_train]),
        "test": list(items[num_train:]),
    }
    return splits, list(items[num_left : num_left + gap])


def split_groups(groups: Sequence[Sequence[Item]], validation_size: float, test_size: float, seed: int) -> Splits:
    """Shuffles groups that must stay together and fills test, then validation, then train; sizes count items.

    A group that no longer fits into test or validation goes on to the next, so those two never exceed their share by
    a large group. Raises ValueError when a split that was asked for stays empty.
    """
    number = sum(len(group) for group in groups)
    num_validation, num_test = split_sizes(number, validation_size, test_size)
    splits: Splits = {"train": [], "validation": [], "test": []}
    for group in random.Random(seed).sample(groups, len(groups)):
        if len(splits["test"]) + len(group) <= num_test:
            splits["test"] += group
        elif len(splits["validation"]) + len(group) <= num_validation:
            splits["validation"] += group
        else:
            splits["train"] += group
    wanted = {"train": True, "validation": num_validation > 0, "test": num_test > 0}
    if empty := [name for name, items in splits.items() if wanted[name] and not items]:
        raise ValueError(
            f"{number} rows form {len(groups)} groups, the largest of {max(map(len, groups), default=0)}, that must not "
            f"be torn apart (same or almost the same image), so {' and '.join(empty)} would be empty: "
            "give more varied data, or a smaller --near_duplicate_bits, --validation_size or --test_size"
        )
    return splits


def connected_groups(number: int, blocks: Iterable[np.ndarray]) -> list[list[int]]:
    """The groups that `number` items fall into when each pair belongs together; in order of their first item.

    `blocks` hold pairs in their first two columns, as `near_duplicates` gives them. No more than PAIRS_HELD are held:
    before that what they join becomes one pair for each item.
    """
    labels, held = np.arange(number), []
    for block in blocks:
        held.append(block[:, :2])
        if sum(map(len, held)) > PAIRS_HELD:
            labels, held = _joined(labels, held), []
    labels = _joined(labels, held)
    groups: dict[int, list[int]] = {}
    for item, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(item)
    return list(groups.values())


def _joined(labels: np.ndarray, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """(items,) the first item of each item's group, when these pairs belong together beside (item, label)."""
    pairs = np.concatenate([np.stack([np.arange(len(labels)), labels], axis=1), *blocks])
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), pairs.T), shape=(len(labels), len(labels)))
    groups = connected_components(graph, directed=False)[1]
    return np.unique(groups, return_index=True)[1][groups]
