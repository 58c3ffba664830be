"""Looks at every image once: is it one, is it whole, is it of a sane size, and what does it look like."""

import argparse
import hashlib
import os
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from heapq import nsmallest
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import imagehash
import numpy as np
from tqdm import tqdm

# The pictures that are checked here are opened by the very function that training opens them with.
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from finetuning.data import pictures
from finetuning.data.near_duplicates import HASH_SIDE, difference_hash, near_duplicates, stack_hashes
from finetuning.data.pictures import PictureError, open_picture
from preparing.text_files import normalise_name

MAX_PIXELS = 50_000_000

# On a fixed camera neighbouring frames differ in a median of 35 bits of 256 (finetuning/data/near_duplicates.py).
NEAR_DUPLICATE_BITS = 25
# Two splits leak when at least this share of the second looks like, or is a moment away from, something in the first.
LEAK_SHARE = 0.5


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about pictures that all preparing commands share."""
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
    """What is wrong with the values of these flags, in words."""
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
    return Inspection(digest, difference_hash(picture), None)


def read_and_inspect(read: Callable[[Any], bytes], max_pixels: int, source: Any) -> Inspection:
    """Read a picture and inspect it; a file that cannot be read is a problem of that picture."""
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


@cache  # a folder holds many files, and every part of its name is looked at on the disk
def resolved_folder(folder: Path) -> Path:
    """`folder.resolve()`."""
    return folder.resolve()


def resolved(path: Path) -> Path:
    """`path.resolve()`, faster of many files in a folder."""
    if path.is_file() and not path.is_symlink():
        return resolved_folder(path.parent) / path.name
    return path.resolve()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with its links followed, lies in `folder`."""
    return resolved(path).is_relative_to(resolved_folder(folder))


@cache  # one look for all names of a table that was written on Windows
def names_in_any_case(folder: Path) -> dict[str, str]:
    """Names of the files in a folder, by what they are without capitals."""
    return {normalise_name(path.name): path.name for path in folder.iterdir()} if folder.is_dir() else {}


def find_inside(name: str, folder: Path) -> Path | tuple[str, str]:
    """The file called `name` in `folder`, in whichever Unicode form it lies on disk; or (reason, detail)."""
    # macOS writes file names in NFD, most text files have them in NFC.
    names = [name, name.replace("\\", "/")]  # Windows writes photos\a.jpg
    forms = (unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))
    path = folder / name
    try:
        if not path.is_file():
            path = next((path for path in map(folder.joinpath, forms) if path.is_file()), path)
        if not is_inside(path, folder):
            return "outside_folder", f"{name!r} lies outside {folder}"
        if path.is_file():
            return path
        inside = folder / names[1].rpartition("/")[2]
        hint = ""
        if inside.is_file():
            hint = f", but {inside.name!r} is: names are looked up inside the folder as they are written"
        elif twin := names_in_any_case(path.parent).get(normalise_name(path.name)):
            hint = f", but {twin!r} is: write the name in its own capitals"
        return "missing_image", f"{name!r} is no file in {folder}{hint}"
    except (OSError, ValueError):  # too long (a picture written out in base64), or characters no file name can have
        return "bad_name", f"{name!r:.60} is no file name"


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
        hashes = [stack_hashes([image.difference_hash for image in images]) for images in (left, right)]
        num_pairs, has_twin, closest = 0, np.zeros(len(right), dtype=bool), []
        for pairs in near_duplicates(*hashes, max_bits):
            num_pairs += len(pairs)
            has_twin[pairs[:, 1]] = True
            closest = nsmallest(5, [*closest, *((bits, row, column) for row, column, bits in pairs.tolist())])
        found = between[f"{first}/{second}"] = {
            "near_duplicate_pairs": num_pairs,
            "images_with_twin": round(float(has_twin.mean()), 4),
            "closest": [
                {first: left[row].image_id, second: right[column].image_id, "bits": bits}
                for bits, row, column in closest
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
    """The leak report in words, a line for each pair of splits."""
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
