"""Looks at every image once: is it one, is it whole, is it of a sane size, and what does it look like."""

import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

# Of Pillow's decoders only these are offered a file; some of the others start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 50_000_000
# What Pillow's decoders raise for damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

# Difference hash of 16x16 = 256 bits. On a fixed camera the background makes all frames alike to a coarse hash: on the
# mall frames, 64-bit hashes cannot tell the next frame from one a minute later. With 256 bits neighbours differ by a
# median of 32, frames 10 apart by 52 and never under 28, frames 300 apart by 59; unrelated pictures by some 100 or more.
HASH_SIDE = 16
NEAR_DUPLICATE_BITS = 25


class Inspection(NamedTuple):
    sha256: str  # of the file's bytes
    difference_hash: bytes  # HASH_SIDE * HASH_SIDE bits; empty when there is a problem
    problem: tuple[str, str] | None  # (reason, detail) for the ledger


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Inspection:
    """Decodes one image fully. Size is read from the header first, so a decompression bomb is never unpacked."""
    digest = hashlib.sha256(data).hexdigest()
    Image.MAX_IMAGE_PIXELS = max_pixels  # so that Pillow's own guard agrees with ours
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Image.DecompressionBombError(f"{width}x{height} pixels")
                image.load()
                bits = imagehash.dhash(image, hash_size=HASH_SIDE).hash
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Inspection(
            digest, b"", ("oversized_image", f"{error}; at most {max_pixels:,} are allowed (--max_pixels)")
        )
    except DECODING_ERRORS as error:
        return Inspection(digest, b"", ("corrupt_image", f"it does not decode: {error}".replace("\n", " ")))
    return Inspection(digest, np.packbits(bits).tobytes(), None)


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


def near_duplicates(left: np.ndarray, right: np.ndarray, max_bits: int) -> Iterator[tuple[int, int, int]]:
    """(row of left, row of right, differing bits) of all pairs of hashes at most `max_bits` apart.

    `left` and `right` are (n, 4) and (m, 4) uint64, as `stack_hashes` makes them. Memory is 32 * m * 40 bytes.
    """
    for start in range(0, len(left), 32):
        differing = np.bitwise_count(left[start : start + 32, None] ^ right[None]).sum(axis=2, dtype=np.uint16)
        for row, column in np.argwhere(differing <= max_bits):
            yield start + int(row), int(column), int(differing[row, column])


def stack_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """(n, 4) uint64 of n difference hashes."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), -1)


class Seen(NamedTuple):
    """An image of a split, as the leak report sees it."""

    image_id: str
    video: str | None  # images of one video have comparable times; None for images that are not frames
    time: int | None
    difference_hash: bytes


def report_leaks(splits: dict[str, list[Seen]], max_bits: int) -> dict[str, Any]:
    """For each two splits: how many image pairs look almost the same, and how near in time their frames come.

    `share_of_second` is the share of the second split's images that have such a twin in the first.
    """
    between = {}
    for first, second in combinations([name for name, images in splits.items() if images], 2):
        left, right = splits[first], splits[second]
        pairs = list(
            near_duplicates(
                stack_hashes([image.difference_hash for image in left]),
                stack_hashes([image.difference_hash for image in right]),
                max_bits,
            )
        )
        between[f"{first}/{second}"] = {
            "near_duplicate_pairs": len(pairs),
            "share_of_second": round(len({column for _, column, _ in pairs}) / len(right), 4),
            "nearest_frames_apart": nearest_in_time(left, right),
            "closest": [
                {first: left[row].image_id, second: right[column].image_id, "bits": bits}
                for row, column, bits in sorted(pairs, key=lambda pair: pair[2])[:5]
            ],
        }
    return {
        "method": f"difference hash of {HASH_SIDE * HASH_SIDE} bits (ImageHash {imagehash.__version__})",
        "near_duplicate_bits": max_bits,
        "between": between,
    }


def nearest_in_time(left: list[Seen], right: list[Seen]) -> int | None:
    """Smallest difference in frame number between the two splits over all videos that are in both."""
    smallest = None
    for video in {image.video for image in left if image.time is not None}:
        times = np.sort([image.time for image in left if image.video == video])
        others = np.array([image.time for image in right if image.video == video], dtype=times.dtype)
        if not len(others):
            continue
        places = np.searchsorted(times, others)
        after = np.abs(times[np.minimum(places, len(times) - 1)] - others).min()
        before = np.abs(times[np.maximum(places - 1, 0)] - others).min()
        smallest = min(int(after), int(before), smallest if smallest is not None else int(after))
    return smallest


def describe_leaks(report: dict[str, Any]) -> str:
    lines = []
    for pair, found in report["between"].items():
        words = f"leak check {pair}: {found['near_duplicate_pairs']:,} near-duplicate pairs"
        if found["near_duplicate_pairs"]:
            second = pair.partition("/")[2]
            words += f", {found['share_of_second']:.0%} of the {second} images have a twin on the other side"
        if found["nearest_frames_apart"] is not None:
            words += f", nearest frames {found['nearest_frames_apart']:,} apart"
        lines.append(words)
    return "\n".join(lines)
