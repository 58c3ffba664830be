"""The interval of a difference: two models on the same items, compared pair by pair."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
BATCH = 500  # resamples held in memory at once
# Below this the percentile interval is far too narrow; one group would even give an interval without width.
MIN_GROUPS = 10


@dataclass(frozen=True)
class Difference:
    """One measure of two models, `tuned` minus `base`, with its 95 % interval."""

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
    block: int = 1  # groups in a block of time; 1 where they are independent
    num_independent: int | None = None  # independent groups that would tell as much; None where all are

    @property
    def outcome(self) -> str:
        """`better`, `worse`, `no measurable change`, or `too few to tell` (under MIN_GROUPS independent groups)."""
        if min(self.num_groups, self.num_independent or self.num_groups) < MIN_GROUPS:
            return "too few to tell"
        if self.low <= 0 <= self.high:
            return "no measurable change"
        return "better" if (self.difference < 0) == self.lower_is_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the outcome in a word."""
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
    times: Mapping[Hashable, Any] | None = None,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap of the mean of `tuned - base`, percentile interval of 95 % (Efron and Tibshirani 1993, ch. 13).

    `base` and `tuned` hold one number per item, in the same order. Items of one group (several questions about one
    image) stand or fall together, so whole groups are drawn, 10,000 times, and the mean is over the items of the groups
    drawn. The same `seed` gives the same interval. ValueError when the lengths differ or there is none.

    `times` says when each group, a frame of a video, was taken (any values that sort; frames of one video together).
    Neighbours in time are not independent: the interval is then that of `block_interval`.
    """
    if not len(base) == len(tuned) == len(groups) or not len(base):
        raise ValueError(
            f"expected as many base and tuned values as groups, at least one; got {len(base)}, {len(tuned)}, {len(groups)}"
        )
    base, tuned = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    sums, sizes = sum_groups(tuned - base, groups)
    block, num_independent = 1, None
    if times is not None:
        names = list(dict.fromkeys(groups))
        order = sorted(range(len(names)), key=lambda number: times[names[number]])
        low, high, block, num_independent = block_interval(sums[order], sizes[order])
    else:
        low, high = percentile_interval(sums, sizes, seed)
    return Difference(
        measure=measure,
        unit=unit,
        lower_is_better=lower_is_better,
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=float((tuned - base).mean()),
        low=low,
        high=high,
        num_groups=len(sums),
        grouped_by=grouped_by,
        block=block,
        num_independent=num_independent,
    )


def sum_groups(values: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the values, number of values) of each group, in the order in which the groups first appear."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    group_of = np.array([numbers[name] for name in groups])
    return np.bincount(group_of, weights=values), np.bincount(group_of)


def percentile_interval(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the mean over all items, when groups with these sums and sizes are drawn."""
    if len(sums) == 1:  # nothing to draw from
        return float(sums[0] / sizes[0]), float(sums[0] / sizes[0])
    from scipy.stats import bootstrap  # half a second of import, which only who compares should pay

    interval = bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis=-1: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def block_interval(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float, int, int]:
    """95 % interval of the mean of a series in time, by the moving-block bootstrap (Kunsch, Annals of Statistics 17, 1989).

    Returns (low, high, groups in a block, independent groups that would tell as much).

    For a mean the bootstrap's standard error is known without drawing: it is that of the means of all blocks of the
    series. Few blocks make it too small and uncertain, so it is widened as a variance over so few is, and taken times the
    t quantile with one degree of freedom less than there are blocks. The blocks are three times as long as Politis and
    White (2004; corrected by Patton et al. 2009) take them, for whom the error of the interval's width counts, not its
    coverage; and no longer than a quarter of the series. `tests/evaluation/test_bootstrap.py` has the coverage.
    """
    number = len(sums)
    mean = sums.sum() / sizes.sum()
    # A ratio of sums is linear in these residuals to first order.
    residuals = (sums - mean * sizes) / sizes.mean()
    variance = float(residuals.var())
    if variance == 0 or number < 4:
        return float(mean), float(mean), 1, number
    block = min(max(3 * block_length(residuals), math.ceil(number ** (1 / 3))), max(number // 4, 1))
    totals = np.concatenate([[0.0], residuals.cumsum()])
    means = (totals[block:] - totals[:-block]) / block
    num_blocks = number / block
    error = math.sqrt(means.var() / num_blocks * num_blocks / (num_blocks - 1))
    from scipy.stats import t

    half = float(t.ppf(0.975, num_blocks - 1)) * error
    num_independent = round(min(number, max(1.0, variance / error**2))) if error else number
    return float(mean - half), float(mean + half), block, num_independent


def block_length(series: np.ndarray) -> int:
    """Groups in a block by the rule of Politis and White (2004), corrected by Patton et al. (2009); 1 for white noise.

    The rule looks for the lag after which no autocorrelation is left, and weighs those up to it with a flat-top window.
    """
    number = len(series)
    window = max(5, math.ceil(math.log10(number)))
    largest = min(math.ceil(math.sqrt(number)) + window, number - 1)
    centred = series - series.mean()
    autocovariances = np.array([centred[: number - lag] @ centred[lag:] / number for lag in range(largest + 1)])
    significant = np.abs(autocovariances / autocovariances[0]) > 2 * math.sqrt(math.log10(number) / number)
    quiet = [lag for lag in range(1, largest - window + 2) if not significant[lag : lag + window].any()]
    last = quiet[0] - 1 if quiet else int(np.flatnonzero(significant).max())
    if last == 0:
        return 1
    lags = np.arange(1, min(2 * last, largest) + 1)
    weights = np.minimum(1.0, 2 * (1 - lags / lags[-1]))
    weighted = weights * autocovariances[lags]
    spectrum, slope = autocovariances[0] + 2 * weighted.sum(), 2 * (lags * weighted).sum()
    if spectrum == 0:
        return 1
    length = (1.5 * slope**2 / spectrum**2 * number) ** (1 / 3)
    return min(max(1, math.ceil(length)), math.ceil(min(3 * math.sqrt(number), number / 3)))
