"""Did training help? Base and tuned model on the same items, compared pair by pair, with an interval."""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
BLOCK = 500  # resamples held in memory at once
# Below this the percentile interval is far too narrow; one group would even give an interval without width.
MIN_GROUPS = 10


@dataclass(frozen=True)
class Difference:
    """One measure of the base and the tuned model, and tuned minus base with its 95 % interval."""

    measure: str
    unit: str
    lower_is_better: bool
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    num_groups: int
    grouped_by: str

    @property
    def outcome(self) -> str:
        """`better`, `worse`, `no measurable change`, or `too few to tell` (under MIN_GROUPS groups)."""
        if self.num_groups < MIN_GROUPS:
            return "too few to tell"
        if self.low <= 0 <= self.high:
            return "no measurable change"
        return "better" if (self.difference < 0) == self.lower_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcome": self.outcome}


def compare(
    measure: str,
    base: Sequence[float],
    tuned: Sequence[float],
    groups: Sequence[Hashable],
    *,
    lower_is_better: bool,
    unit: str = "",
    grouped_by: str = "images",
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of the mean of `tuned - base`, percentile interval of 95 % (Efron and Tibshirani 1993, ch. 13).

    `base` and `tuned` hold one number per item, in the same order. Items of one group (several questions about one
    image) stand or fall together, so whole groups are drawn, 10,000 times, and the mean is over the items of the groups
    drawn. Neighbouring frames of a video are alike, too: to count them as independent makes the interval too narrow
    rather than too wide. The same `seed` gives the same interval. ValueError when the lengths differ or there is none.
    """
    if not len(base) == len(tuned) == len(groups) or not len(base):
        raise ValueError(
            f"expected as many base and tuned values as groups, at least one; got {len(base)}, {len(tuned)}, {len(groups)}"
        )
    base, tuned = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group_of = np.array([names[name] for name in groups])
    sums = np.bincount(group_of, weights=tuned - base)
    sizes = np.bincount(group_of)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, NUM_RESAMPLES, BLOCK):
        drawn = rng.integers(len(sums), size=(min(BLOCK, NUM_RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(
        measure=measure,
        unit=unit,
        lower_is_better=lower_is_better,
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=float((tuned - base).mean()),
        low=float(low),
        high=float(high),
        num_groups=len(sums),
        grouped_by=grouped_by,
    )


def describe(difference: Difference) -> str:
    """One plain sentence with the outcome first, naming the interval."""
    unit = f" {difference.unit}" if difference.unit else ""
    change = f"{difference.measure} went from {difference.base:.2f} to {difference.tuned:.2f}{unit}"
    interval = (
        f"a change of {difference.difference:+.2f}, 95 % interval {difference.low:+.2f} to {difference.high:+.2f}, "
        f"over {difference.num_groups} {difference.grouped_by}"
    )
    if difference.outcome == "too few to tell":
        return f"Too few to tell: {change}, but {difference.num_groups} {difference.grouped_by} decide nothing; use {MIN_GROUPS} or more."
    ending = ", which includes 0" if difference.outcome == "no measurable change" else ""
    return f"{difference.outcome.capitalize()}: {change} ({interval}{ending})."
