"""Pairs of hashes that are few bits apart: all of them, once, however they are looked for."""

import numpy as np
import pytest

from finetuning.data import near_duplicates
from finetuning.data.near_duplicates import HASH_BITS


def hashes_of(rng: np.random.Generator, originals: int, number: int) -> np.ndarray:
    """(number, 4) uint64: each one of a few originals with up to 30 of its bits turned."""
    bits = rng.integers(0, 2, (originals, HASH_BITS), dtype=np.uint8)[rng.integers(0, originals, number)]
    for row in bits:
        row[rng.choice(HASH_BITS, rng.integers(0, 30), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.mark.parametrize("looked_up", [True, False])
@pytest.mark.parametrize("max_bits", [0, 12, 25])
def test_every_pair_is_found_once(monkeypatch, looked_up, max_bits):
    monkeypatch.setattr(near_duplicates, "FEW_PAIRS", 0)
    monkeypatch.setattr(near_duplicates, "WORTH_AN_INDEX", np.inf if looked_up else 0)
    monkeypatch.setattr(near_duplicates, "AT_ONCE", 50)
    rng = np.random.default_rng(max_bits)
    left, right = hashes_of(rng, 40, 100), hashes_of(rng, 5, 60)
    left[90:], right[:30] = left[:10], left[:30]  # the very same
    for first, second in ((left, left), (left, right)):
        bits = [np.unpackbits(hashes.view(np.uint8), axis=1) for hashes in (first, second)]
        apart = (bits[0][:, None] != bits[1]).sum(axis=2)
        wanted = [
            (row, column, apart[row, column])
            for row, column in np.argwhere(apart <= max_bits).tolist()
            if first is not second or row < column
        ]
        blocks = list(near_duplicates.near_duplicates(first, second, max_bits))
        assert len(wanted) > 0 and sorted(map(tuple, np.concatenate(blocks).tolist())) == wanted
