"""Pictures that look almost the same: difference hashes, and all pairs of them that are few bits apart."""

from collections.abc import Iterator, Sequence

import imagehash
import numpy as np
from PIL import Image

# Difference hash of 16x16 = 256 bits. On a fixed camera the background makes all frames alike to a coarse hash: on the
# mall frames, 64-bit hashes cannot tell the next frame from one a minute later. Of 256 bits neighbours differ in a
# median of 35 and in at most 25 for 17% of them; frames 10 apart in 56 and never under 28; frames 300 apart in 64.
HASH_SIDE = 16

# Copies of a picture that are encoded anew, brighter or smaller differ in at most 13 bits, and in grey of 64x64 at most by
# 30 of 255 after their means are taken out. Neighbouring mall frames of different counts differ by 111 and more.
COPY_BITS, COPY_SIDE, COPY_DIFFERENCE = 12, 64, 25


def difference_hash(picture: Image.Image) -> bytes:
    """HASH_SIDE * HASH_SIDE bits that say where a picture becomes brighter from left to right."""
    # Averaging pixels first drops camera noise from the hash, and is four times as fast.
    grey = picture.convert("L").reduce(max(1, min(picture.size) // (4 * HASH_SIDE)))
    return np.packbits(imagehash.dhash(grey, hash_size=HASH_SIDE).hash).tobytes()


def are_copies(left: Image.Image, right: Image.Image) -> bool:
    """Whether two pictures show the same, nothing as small as a distant person excepted."""
    grey = []
    for picture in (left, right):
        values = np.asarray(picture.convert("L").resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX), dtype=np.float32)
        grey.append(values - values.mean())
    return float(np.abs(grey[0] - grey[1]).max()) <= COPY_DIFFERENCE


def near_duplicates(left: np.ndarray, right: np.ndarray, max_bits: int) -> Iterator[tuple[int, int, int]]:
    """(row of left, row of right, differing bits) of all pairs of hashes at most `max_bits` apart.

    `left` and `right` are (n, 4) and (m, 4) uint64, as `stack_hashes` makes them. Of an array with itself each pair comes
    once, the smaller row first. 10^8 pairs that look nothing alike take 0.26 s on one core, of look-alikes 0.9 s.
    """
    words = np.ascontiguousarray(right.T[:2])
    for row, of_row in enumerate(left):
        start = row + 1 if left is right else 0
        in_half = np.bitwise_count(words[0, start:] ^ of_row[0])
        in_half += np.bitwise_count(words[1, start:] ^ of_row[1])
        near = start + np.flatnonzero(in_half <= max_bits)
        differing = np.bitwise_count(right[near] ^ of_row).sum(
            axis=1, dtype=np.uint16
        )  # up to 256, which is 0 in a byte
        for place in np.flatnonzero(differing <= max_bits):
            yield row, int(near[place]), int(differing[place])


def stack_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """(n, 4) uint64 of n difference hashes."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), -1)
