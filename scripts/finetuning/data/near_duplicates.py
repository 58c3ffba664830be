"""Pictures that look almost the same: difference hashes, and all pairs of them that are few bits apart."""

from collections.abc import Iterator, Sequence

import imagehash
import numpy as np
from PIL import Image

# Difference hash of 16x16 = 256 bits. On a fixed camera the background makes all frames alike to a coarse hash: on the
# mall frames, 64-bit hashes cannot tell the next frame from one a minute later. Of 256 bits neighbours differ in a
# median of 35 and in at most 25 for 17% of them; frames 10 apart in 56 and never under 28; frames 300 apart in 64.
HASH_SIDE = 16
HASH_BITS = HASH_SIDE * HASH_SIDE

# Bits of a hash fall into BANDS of WIDTH or one less, by which pairs are looked up. Fewer pairs are compared at once, and
# so are hashes that are so alike that the index would find more than this share of all pairs.
BANDS, WIDTH, FEW_PAIRS, WORTH_AN_INDEX = 13, 20, 20_000_000, 0.05
AT_ONCE = 1 << 19  # candidates that are compared at once

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


def near_duplicates(left: np.ndarray, right: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    """All pairs of hashes at most `max_bits` apart, in blocks of (pairs, 3): row of left, row of right, differing bits.

    `left` and `right` are (n, 4) and (m, 4) uint64, as `stack_hashes` makes them. Each pair comes once, in no order; of an
    array with itself the smaller row first. Blocks are small: look-alikes of a camera that sees nothing move are many.
    """
    if max_bits < 2 * BANDS and len(left) * len(right) > FEW_PAIRS:
        keys = [_band_keys(left, band) for band in range(BANDS)], [_band_keys(right, band) for band in range(BANDS)]
        # Buckets of neighbouring keys are about as full as those of equal ones.
        alike = sum(
            int(np.bincount(a, minlength=1 << WIDTH) @ np.bincount(b, minlength=1 << WIDTH))
            for a, b in zip(*keys, strict=True)
        )
        if alike * (WIDTH + 1) < len(left) * len(right) * WORTH_AN_INDEX:
            yield from _look_up(left, right, *keys, max_bits)
            return
    yield from _compare_all(left, right, max_bits)


def _compare_all(left: np.ndarray, right: np.ndarray, max_bits: int) -> Iterator[np.ndarray]:
    """Each with each: 10^8 pairs in 0.2 s on one core."""
    words = np.ascontiguousarray(right.T[:2])
    for row, of_row in enumerate(left):
        start = row + 1 if left is right else 0
        in_half = np.bitwise_count(words[0, start:] ^ of_row[0])
        in_half += np.bitwise_count(words[1, start:] ^ of_row[1])
        near = start + np.flatnonzero(in_half <= max_bits)
        if len(near):
            yield _near(left, right, np.full(len(near), row), near, max_bits)


def _band_keys(hashes: np.ndarray, band: int) -> np.ndarray:
    """(n,) int32: every BANDS-th bit of each hash from bit `band` on. Neighbouring bits say much the same."""
    keys = np.zeros(len(hashes), dtype=np.int32)
    for place, bit in enumerate(range(band, HASH_BITS, BANDS)):
        keys |= ((hashes[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)).astype(np.int32) << np.int32(place)
    return keys


def _look_up(
    left: np.ndarray, right: np.ndarray, keys_left: list[np.ndarray], keys_right: list[np.ndarray], max_bits: int
) -> Iterator[np.ndarray]:
    """By an index of each band (multi-index hashing, Norouzi et al., arXiv 1307.2982).

    Of 2 * BANDS - 1 differing bits some band holds at most one. So each band is looked up as it is, and with each of its
    bits turned; a pair belongs to the first band that finds it.
    """
    bands = [_band_mask(band) for band in range(BANDS)]
    for band in range(BANDS):
        order = np.argsort(keys_right[band], kind="stable")
        ends = np.cumsum(np.bincount(keys_right[band], minlength=1 << WIDTH), dtype=np.int64)
        for turned in (0, *(1 << bit for bit in range(WIDTH))):
            keys = keys_left[band] ^ turned
            counts = ends[keys] - np.where(keys > 0, ends[keys - 1], 0)
            rows = np.flatnonzero(counts)
            upto = np.cumsum(counts[rows])
            cuts = np.searchsorted(
                upto, np.arange(AT_ONCE, (upto[-1] if len(rows) else 0) + AT_ONCE, AT_ONCE), side="right"
            )
            for some in np.split(rows, cuts):
                number = counts[some]
                into = np.repeat(ends[keys[some]] - np.cumsum(number), number) + np.arange(number.sum())
                found = _near(left, right, np.repeat(some, number), order[into], max_bits)
                if left is right:
                    found = found[found[:, 0] < found[:, 1]]
                differing = left[found[:, 0]] ^ right[found[:, 1]]
                earlier = [np.bitwise_count(differing & mask).sum(axis=1) <= 1 for mask in bands[:band]]
                found = found[~np.any(earlier, axis=0)] if earlier else found
                if len(found):
                    yield found


def _band_mask(band: int) -> np.ndarray:
    """(4,) uint64 with the bits of a band set."""
    mask = np.zeros(HASH_BITS // 64, dtype=np.uint64)
    for bit in range(band, HASH_BITS, BANDS):
        mask[bit // 64] |= np.uint64(1) << np.uint64(bit % 64)
    return mask


def _near(left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, max_bits: int) -> np.ndarray:
    """Of these pairs those that are near, as `near_duplicates` gives them."""
    differing = np.bitwise_count(left[rows, 0] ^ right[columns, 0])
    near = np.flatnonzero(differing <= max_bits)
    rows, columns = rows[near], columns[near]
    differing = np.bitwise_count(left[rows] ^ right[columns]).sum(axis=1, dtype=np.int64)  # 256 is 0 in a byte
    found = np.stack([rows, columns, differing], axis=1)
    return found[differing <= max_bits]


def stack_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """(n, 4) uint64 of n difference hashes."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(len(hashes), -1)
