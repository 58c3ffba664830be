"""Counts with intervals that hold: a temperature and a width for a model's distribution over counts.

A tuned model is surer than it should be. A temperature makes its distribution as wide as its errors on rows that it has
not learned from; split-conformal prediction (Vovk et al. 2005; Lei et al. 2018, locally weighted) then turns 90 % into a
promise for rows like those: the interval is median +- width x (1 + standard deviation). Neighbouring frames of a video are
off by the same: a calibration on them is worth fewer rows than it has (`effective_rows`), and its width is that of so many.
From 300 such rows on the promise holds within three points, with fewer it is only about so, and `Calibration.note` says it.
Frames of a stream drift: `AdaptiveWidth` follows them (Gibbs and Candès 2021, adaptive conformal inference).
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

ENOUGH_ROWS = 300
NEARLY_ALL = 0.7  # of independent rows `effective_rows` finds so many or more 19 times in 20
COVERAGE = 0.9


@dataclass(frozen=True)
class Calibration:
    """`temperature` of the distribution, `width` of the interval in its (1 + standard deviation)s, from `rows` rows.

    `independent` is what these rows are worth where neighbours are off by the same.
    """

    temperature: float = 1.0
    width: float | None = None  # None: not calibrated, the interval holds `coverage` of the distribution itself
    rows: int = 0
    independent: int = 0
    coverage: float = COVERAGE

    @property
    def note(self) -> str:
        """How far the interval can be trusted, in words."""
        if self.width is None:
            return "not calibrated: the interval is the model's own opinion"
        independent = self.independent or self.rows  # calibrations of old runs do not say
        alike = independent < NEARLY_ALL * self.rows
        worth = f", neighbours in time that are worth {independent}" if alike else ""
        few = (
            f", fewer than the {ENOUGH_ROWS} that make {self.coverage:.0%} a promise"
            if independent < NEARLY_ALL * ENOUGH_ROWS
            else ""
        )
        return f"calibrated on {self.rows} rows{worth}{few}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the note."""
        return asdict(self) | {"note": self.note}


@dataclass(frozen=True)
class Count:
    """What is reported of one row: the median, an interval with both ends included, and the median's own probability."""

    count: int
    low: int
    high: int
    probability: float


def probabilities(log_likelihoods: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., counts) -> the same shape, each row a distribution over the candidates alone."""
    return (log_likelihoods.double() / temperature).softmax(-1)


def medians(distribution: Tensor) -> Tensor:
    """(rows, counts) -> (rows,): the smallest count that at least half of the probability does not exceed."""
    return (distribution.cumsum(-1) >= 0.5 - 1e-12).long().argmax(-1)


def spreads(distribution: Tensor) -> Tensor:
    """(rows, counts) -> (rows,): 1 + standard deviation, in people."""
    counts = torch.arange(distribution.shape[-1], dtype=distribution.dtype)
    mean = distribution @ counts
    return 1.0 + (distribution @ counts**2 - mean**2).clamp(min=0).sqrt()


def calibrate(log_likelihoods: Tensor, truth: Tensor, coverage: float = COVERAGE) -> Calibration:
    """(rows, counts) of rows that the model has not learned from, and their true counts -> temperature and width.

    The temperature has the least ranked probability score, in people; the width is the conformal quantile of
    |truth - median| / spread: of n independent rows the ceil((n + 1) coverage)-th smallest, of rows in the order of time the
    share (n + 1) coverage / n of them, n being `effective_rows`. Counts beyond the candidates are as far off as they are.
    ValueError without rows.
    """
    if not len(truth):
        raise ValueError("calibration needs at least one row with a true count")
    temperatures = torch.logspace(-1, 1.5, 101).tolist()
    temperature = min(temperatures, key=lambda value: ranked_score(probabilities(log_likelihoods, value), truth))
    scores = nonconformity(probabilities(log_likelihoods, temperature), truth)
    rows, independent = len(truth), effective_rows(scores)
    # Rounded first: (n + 1) / n of n rows is a whole number that floats may exceed.
    place = min(math.ceil(round(rows * (independent + 1) / independent * coverage, 6)), rows)
    return Calibration(temperature, float(scores.sort().values[place - 1]), rows, round(independent), coverage)


def effective_rows(scores: Tensor) -> float:
    """How many independent rows tell as much as `scores` (rows,) in the order of time, 1 to rows.

    rows / (1 + 2 sum of autocorrelations), up to the first that is not positive (Geyer 1992).
    """
    rows = len(scores)
    centred = scores.double() - scores.double().mean()
    variance = float(centred.square().sum())
    if variance == 0:
        return rows
    total = 0.0
    for lag in range(1, rows // 2):
        correlation = float(centred[lag:] @ centred[:-lag]) / variance
        if correlation <= 0:
            break
        total += correlation
    return max(1.0, rows / (1 + 2 * total))


def nonconformity(distribution: Tensor, truth: Tensor) -> Tensor:
    """(rows,): how many spreads the truth is from the median."""
    return (truth - medians(distribution)).abs() / spreads(distribution)


def ranked_score(distribution: Tensor, truth: Tensor) -> float:
    """Mean continuous ranked probability score: sum over counts of (P(count <= k) - [truth <= k])^2, in people."""
    reached = truth[:, None] <= torch.arange(distribution.shape[-1])
    return float((distribution.cumsum(-1) - reached.double()).square().sum(-1).mean())


def read_out(log_likelihoods: Tensor, calibration: Calibration, width: float | None = None) -> list[Count]:
    """Median, interval and probability of each row of (rows, counts); `width` instead of the calibration's."""
    distribution = probabilities(log_likelihoods, calibration.temperature)
    middle, spread = medians(distribution), spreads(distribution)
    width = calibration.width if width is None else width
    if width is None:
        tail = (1 - calibration.coverage) / 2
        reached = distribution.cumsum(-1)
        low = (reached > tail + 1e-12).long().argmax(-1)
        high = (reached >= 1 - tail - 1e-12).long().argmax(-1)
    else:
        low = (middle - width * spread).ceil().clamp(min=0).long()
        high = (middle + width * spread).floor().clamp(max=distribution.shape[-1] - 1).long()
    mass = distribution.gather(-1, middle[:, None])[:, 0]
    return [Count(*map(int, ends), float(p)) for *ends, p in zip(middle, low, high, mass, strict=True)]


@dataclass
class AdaptiveWidth:
    """A width for frames of a stream, which drift: it grows after a miss and shrinks after a hit.

    `scores` are the calibration rows' `nonconformity`; `observe` a frame whose truth became known, `width()` for the
    next. Over a long stream the share of misses tends to 1 - `coverage` whatever the stream does.
    """

    scores: Sequence[float]
    coverage: float = COVERAGE
    rate: float = 0.02  # how fast the level follows
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.scores = sorted(self.scores)
        self.level = self.coverage

    def width(self) -> float:
        """Half the interval's width, in people; infinite where the level asks for all."""
        if self.level >= 1:
            return math.inf
        place = math.ceil((len(self.scores) + 1) * max(self.level, 0.0))
        return self.scores[min(max(place, 1), len(self.scores)) - 1]

    def observe(self, score: float) -> None:
        """Take the `nonconformity` of a frame that was answered with the present width."""
        missed = score > self.width()
        self.level += self.rate * (missed - (1 - self.coverage))
        bisect.insort(self.scores, score)
