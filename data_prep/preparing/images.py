"""Looks at every image once: is it one, is it whole, is it of a sane size, and what does it look like."""

import argparse
import hashlib
import os
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import imagehash
import numpy as np
from tqdm import tqdm

# The pictures that are checked here are opened by the very function that training opens them with.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from finetuning.data import pictures
from finetuning.data.pictures import PictureError, open_picture

MAX_PIXELS = 50_000_000

# Difference hash of 16x16 = 256 bits. On a fixed camera the background makes all frames alike to a coarse hash: on the
# mall frames, 64-bit hashes cannot tell the next frame from one a minute later. Of 256 bits neighbours differ in a
# median of 35 and in at most 25 for 17% of them; frames 10 apart in 56 and never under 28; frames 300 apart in 64.
HASH_SIDE = 16
NEAR_DUPLICATE_BITS = 25
# Two splits leak when at least this share of the second looks like, or is a moment away from, something in the first.
LEAK_SHARE = 0.5


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help="larger images are rejected (default 50 million)"
    )
    parser.add_argument(
        "--near_duplicate_bits",
        type=int,
        default=NEAR_DUPLICATE_BITS,
        help="differing bits of 256 up to which two images are near-duplicates (default %(default)s)",
    )


def image_flag_problems(args: argparse.Namespace) -> list[str]:
    smallest = {"max_pixels": 1, "near_duplicate_bits": 0}
    problems = [
        f"--{name} {getattr(args, name)}: expected {least} or more"
        for name, least in smallest.items()
        if getattr(args, name) < least
    ]
    if args.max_pixels > pictures.MAX_PIXELS:
        problems.append(f"--max_pixels {args.max_pixels}: training opens pictures of at most {pictures.MAX_PIXELS:,}")
    return problems


class Inspection(NamedTuple):
    sha256: str  # of the file's bytes
    difference_hash: bytes  # HASH_SIDE * HASH_SIDE bits; empty when there is a problem
    problem: tuple[str, str] | None  # (reason, detail) for the ledger


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Inspection:
    """Opens one picture as training will. Its size is read from the header, so a decompression bomb is never unpacked."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        picture = open_picture(data, max_pixels=max_pixels)
    except PictureError as error:
        advice = " (--max_pixels)" if error.reason == "oversized_image" else ""
        return Inspection(digest, b"", (error.reason, f"{error}{advice}"))
    # Averaging pixels first drops camera noise from the hash, and is four times as fast.
    grey = picture.convert("L").reduce(max(1, min(picture.size) // (4 * HASH_SIDE)))
    return Inspection(digest, np.packbits(imagehash.dhash(grey, hash_size=HASH_SIDE).hash).tobytes(), None)


def read_and_inspect(read: Callable[[Any], bytes], max_pixels: int, source: Any) -> Inspection:
    try:
        data = read(source)
    except OSError as error:
        return Inspection("", b"", ("unreadable_image", f"it cannot be read: {error.strerror}"))
    return inspect_image(data, max_pixels)


def inspect_images(sources: Sequence[Any], read: Callable[[Any], bytes], max_pixels: int) -> Iterator[Inspection]:
    """One Inspection per source, in order, on all cores. `read` gives the bytes of a source; both are picklable."""
    inspect = partial(read_and_inspect, read, max_pixels)
    with tqdm(total=len(sources), desc="checking images", unit="image") as progress:
        num_workers = min(len(os.sched_getaffinity(0)), len(sources) // 50)  # a handful is not worth a process
        if num_workers < 2:
            for inspection in map(inspect, sources):
                progress.update()
                yield inspection
            return
        with ProcessPoolExecutor(num_workers) as pool:
            for inspection in pool.map(inspect, sources, chunksize=16):
                progress.update()
                yield inspection


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with its links followed, lies in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())


def find_inside(name: str, folder: Path) -> Path | tuple[str, str]:
    """The file called `name` in `folder`, in whichever Unicode form it lies on disk; or (reason, detail)."""
    # macOS writes file names in NFD, most text files have them in NFC.
    names = [name, name.replace("\\", "/")]  # Windows writes photos\a.jpg
    paths = [folder / unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD")]
    paths.insert(0, folder / name)
    try:
        path = next((path for path in paths if path.is_file()), paths[0])
        if not is_inside(path, folder):
            return "outside_folder", f"{name!r} lies outside {folder}"
        if path.is_file():
            return path
        inside = folder / names[1].rpartition("/")[2]
        hint = f", but {inside.name!r} is: names are looked up inside the folder as they are written"
        return "missing_image", f"{name!r} is no file in {folder}{hint if inside.is_file() else ''}"
    except (OSError, ValueError):  # too long (a picture written out in base64), or characters no file name can have
        return "bad_name", f"{name!r:.60} is no file name"


def near_duplicates(left: np.ndarray, right: np.ndarray, max_bits: int) -> Iterator[tuple[int, int, int]]:
    """(row of left, row of right, differing bits) of all pairs of hashes at most `max_bits` apart.

    `left` and `right` are (n, 4) and (m, 4) uint64, as `stack_hashes` makes them. 10^8 pairs take 0.6 s on one core.
    """
    words = np.ascontiguousarray(right.T)
    for row, of_row in enumerate(left):
        differing = np.zeros(len(right), dtype=np.uint16)  # up to 256, which is 0 in a byte
        for word, of_word in zip(words, of_row, strict=True):
            differing += np.bitwise_count(word ^ of_word)
        for column in np.flatnonzero(differing <= max_bits):
            yield row, int(column), int(differing[column])


def stack_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """(n, 4) uint64 of n difference hashes."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), -1)


class Seen(NamedTuple):
    """An image of a split, as the leak report sees it."""

    image_id: str
    video: str | None  # times compare within one video
    time: int  # frame number; of no meaning where the report is made without max_frames_apart
    difference_hash: bytes


def report_leaks(splits: dict[str, list[Seen]], max_bits: int, max_frames_apart: int | None = None) -> dict[str, Any]:
    """For each two splits: how many image pairs look almost the same, and how near in time their frames come.

    `images_with_twin` is the share of the second split's images that have a near-duplicate in the first, and
    `images_near_in_time` the share that has a frame of the first at most `max_frames_apart` frames away: on a fixed
    camera the second says more, because a few people moving change the hash while the count stays. `leaks` is true
    where one of the two shares is LEAK_SHARE or more.
    """
    between: dict[str, dict[str, Any]] = {}
    for first, second in combinations([name for name, images in splits.items() if images], 2):
        left, right = splits[first], splits[second]
        pairs = list(
            near_duplicates(
                stack_hashes([image.difference_hash for image in left]),
                stack_hashes([image.difference_hash for image in right]),
                max_bits,
            )
        )
        found = between[f"{first}/{second}"] = {
            "near_duplicate_pairs": len(pairs),
            "images_with_twin": round(len({column for _, column, _ in pairs}) / len(right), 4),
            "closest": [
                {first: left[row].image_id, second: right[column].image_id, "bits": bits}
                for row, column, bits in sorted(pairs, key=lambda pair: pair[2])[:5]
            ],
        }
        if max_frames_apart is not None:
            apart = frames_apart(left, right)
            found["nearest_frames_apart"] = min(apart, default=None)
            found["images_near_in_time"] = round(sum(d <= max_frames_apart for d in apart) / len(right), 4)
        found["leaks"] = max(found["images_with_twin"], found.get("images_near_in_time", 0)) >= LEAK_SHARE
    return {
        "method": f"difference hash of {HASH_SIDE * HASH_SIDE} bits (ImageHash {imagehash.__version__})",
        "near_duplicate_bits": max_bits,
        "max_frames_apart": max_frames_apart,
        "between": between,
    }


def frames_apart(left: list[Seen], right: list[Seen]) -> list[int]:
    """For each frame of `right` whose video is in `left` too: frames to the nearest one of `left`."""
    times_of: dict[str | None, list[int]] = {}
    for image in left:
        times_of.setdefault(image.video, []).append(image.time)
    for times in times_of.values():
        times.sort()
    apart = []
    for image in right:
        if times := times_of.get(image.video):
            place = bisect_left(times, image.time)
            apart.append(min(abs(time - image.time) for time in times[max(place - 1, 0) : place + 1]))
    return apart


def describe_leaks(report: dict[str, Any]) -> str:
    lines = []
    for pair, found in report["between"].items():
        second = pair.partition("/")[2]
        words = f"leak check {pair}: {found['near_duplicate_pairs']:,} near-duplicate pairs"
        if found["near_duplicate_pairs"]:
            words += f" ({found['images_with_twin']:.1%} of the {second} images have a twin)"
        if found.get("nearest_frames_apart") is not None:
            words += f"; nearest frames {found['nearest_frames_apart']:,} apart"
            words += f", {found['images_near_in_time']:.1%} of {second} within {report['max_frames_apart']}"
        if found["leaks"]:
            words += f"\n  LEAK: scores on {second} will flatter a model that was trained or chosen on the other side"
        lines.append(words)
    return "\n".join(lines)
