"""Which pictures tell the same: frames that follow each other in a video, and near-copies."""

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# A video's frames are numbered one by one, or every so many: steps of at most this, or half of the steps alike.
SMALL_STEP = 10
SHARE_IN_VIDEOS = 0.8
SIDE = 16
# Mean difference of two thumbnails, in levels of 255. A frame saved again as JPEG differs by 0.1 to 0.6, with noise of
# 25 levels by 1.0; the most alike of 299 pairs of neighbours from a mall's camera, half a second apart, by 2.9.
NEAR_COPY = 2.0

Moment = tuple[str, int]


def frame_times(names: Iterable[str]) -> dict[str, Moment] | None:
    """Name of each frame -> (video, number), which sorts by time; None when these are no frames of videos.

    Told by the names: the same but for one running number ("lobby/seq_000801.jpg"), most of them in small or equal
    steps. Numbered photos of unrelated things are taken for frames, too: that only makes an interval a little wider.
    """
    distinct = list(dict.fromkeys(names))
    moments: dict[str, Moment] = {}
    videos: dict[str, list[int]] = {}
    for name in distinct:
        path = PurePosixPath(name)
        numbers = list(re.finditer(r"\d+", path.stem))
        if not numbers:
            continue
        last = numbers[-1]
        video = f"{path.parent}/{path.stem[: last.start()]}#{path.stem[last.end() :]}{path.suffix}"
        moments[name] = (video, int(last[0]))
        videos.setdefault(video, []).append(int(last[0]))
    in_videos = sum(len(numbers) for numbers in videos.values() if is_running(sorted(numbers)))
    if not in_videos or in_videos < SHARE_IN_VIDEOS * len(distinct):
        return None
    return {name: moments.get(name, ("", 0)) for name in distinct}


def is_running(numbers: Sequence[int]) -> bool:
    """Whether numbers of frames go on in small or even steps, as in a video."""
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    if len(steps) < 2:
        return False
    commonest = statistics.mode(steps)
    return statistics.median(steps) <= SMALL_STEP or steps.count(commonest) >= len(steps) / 2


def thumbnail(picture: Image.Image) -> np.ndarray:
    """(SIDE * SIDE * 3,) float32: the picture so small that noise and compression are averaged away."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


def near_copies(thumbnails: Sequence[np.ndarray]) -> list[int]:
    """The number of the first picture that each one is a near-copy of, directly or over others; its own where none."""
    if not len(thumbnails):
        return []
    thumbnails = np.stack(thumbnails)
    # Near-copies are almost equally bright: only those are compared.
    order = np.argsort(thumbnails.mean(axis=1), kind="stable")
    brightness = thumbnails.mean(axis=1)[order]
    pairs: list[tuple[int, int]] = []
    for place, number in enumerate(order):
        end = int(np.searchsorted(brightness, brightness[place] + NEAR_COPY, side="right"))
        others = order[place + 1 : end]
        differences = np.abs(thumbnails[others] - thumbnails[number]).mean(axis=1)
        pairs += [(int(number), int(other)) for other in others[differences <= NEAR_COPY]]
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(order), len(order)))
    _, labels = connected_components(graph, directed=False)
    first: dict[int, int] = {}
    return [first.setdefault(int(label), number) for number, label in enumerate(labels)]
