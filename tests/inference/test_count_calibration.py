"""Median and intervals by hand, and intervals that cover what they say."""

import math

import pytest
import torch

from finetuning.inference.count_calibration import (
    AdaptiveWidth,
    Calibration,
    Count,
    calibrate,
    effective_rows,
    medians,
    nonconformity,
    probabilities,
    ranked_score,
    read_out,
    spreads,
)


def overconfident(rows: int, seed: int, drift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods of a model that thinks itself off by 1 person and is off by 3, and the true counts."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(10, 50, (rows,), generator=generator)
    error = 3 * torch.randn(rows, generator=generator) * (1 + drift * torch.arange(rows) / rows)
    counts = torch.arange(81)
    return -0.5 * (counts - (truth + error)[:, None]) ** 2, truth


def covered(log_likelihoods, truth, calibration) -> float:
    counts = read_out(log_likelihoods, calibration)
    return sum(count.low <= true <= count.high for count, true in zip(counts, truth.tolist(), strict=True)) / len(truth)


def test_median_spread_and_score_by_hand():
    distribution = torch.tensor([[0.2, 0.3, 0.5, 0.0], [0.0, 0.0, 0.1, 0.9]], dtype=torch.float64)
    assert medians(distribution).tolist() == [1, 3]
    assert spreads(distribution).tolist() == pytest.approx([1 + math.sqrt(2.3 - 1.3**2), 1.3])
    # Truth 2: (0.2)^2 + (0.5)^2 + 0; truth 3: 0 + 0 + (0.1)^2
    assert ranked_score(distribution, torch.tensor([2, 3])) == pytest.approx((0.29 + 0.01) / 2)
    assert nonconformity(distribution, torch.tensor([3, 3])).tolist() == pytest.approx(
        [2 / float(spreads(distribution)[0]), 0]
    )


def test_candidates_that_cannot_be_leave_the_others_their_share():
    assert probabilities(torch.tensor([math.log(0.1), math.log(0.3)])).tolist() == pytest.approx([0.25, 0.75])
    assert probabilities(torch.tensor([math.log(0.1), math.log(0.9)]), 2.0).tolist() == pytest.approx([0.25, 0.75])


def test_without_calibration_the_interval_is_the_models_own():
    likelihoods = torch.tensor([[0.04, 0.16, 0.6, 0.16, 0.04], [0.0, 0.0, 0.0, 0.0, 1.0]]).clamp(min=1e-9).log()
    assert read_out(likelihoods, Calibration()) == [
        Count(2, 1, 3, pytest.approx(0.6)),
        Count(4, 4, 4, pytest.approx(1.0)),
    ]
    assert "own opinion" in Calibration().note


@pytest.mark.slow
def test_calibrated_intervals_cover_what_they_say():
    raw = covered(*overconfident(2000, 1), Calibration())
    assert raw < 0.6
    calibration = calibrate(*overconfident(400, 0))
    assert calibration.temperature > 3  # a variance of 9 where the model says 1
    assert covered(*overconfident(2000, 1), calibration) == pytest.approx(0.9, abs=0.035)
    assert calibration.note == "calibrated on 400 rows"
    assert "fewer than the 300" in calibrate(*overconfident(200, 0)).note


def alike(rows: int, correlation: float, generator: torch.Generator) -> torch.Tensor:
    """Standard normal errors of neighbouring frames, by an autoregression of first order."""
    errors = torch.randn(rows, generator=generator, dtype=torch.float64)
    for row in range(1, rows):
        errors[row] = correlation * errors[row - 1] + math.sqrt(1 - correlation**2) * errors[row]
    return errors


@pytest.mark.slow
def test_intervals_hold_where_neighbouring_frames_are_off_by_the_same():
    """80 frames of a video to calibrate on and the next 200 to hold in, 100 videos; rows taken as independent hold in 87 %."""
    generator, counts, shares = torch.Generator().manual_seed(0), torch.arange(81), []
    for _ in range(100):
        truth = torch.randint(20, 40, (280,), generator=generator)
        middles = truth + 4 * alike(280, 0.9, generator)
        likelihoods = -0.5 * ((counts - middles[:, None]) / 4) ** 2
        calibration = calibrate(likelihoods[:80], truth[:80])
        shares.append(covered(likelihoods[80:], truth[80:], calibration))
    assert sum(shares) / 100 == pytest.approx(0.92, abs=0.025)
    assert calibration.independent < 50
    assert f"worth {calibration.independent}, fewer than the 300" in calibration.note


def test_rows_that_say_the_same_are_worth_fewer():
    generator = torch.Generator().manual_seed(1)
    assert effective_rows(torch.randn(400, generator=generator)) > 280
    assert 15 < effective_rows(alike(400, 0.9, generator)) < 60  # 400 (1 - 0.9) / (1 + 0.9) = 21
    assert effective_rows(torch.ones(5)) == 5


def test_calibration_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        calibrate(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))


@pytest.mark.slow
def test_the_adaptive_width_keeps_its_promise_where_errors_grow():
    calibration = calibrate(*overconfident(400, 0))
    stream, truth = overconfident(3000, 2, drift=2.0)
    assert covered(stream, truth, calibration) < 0.83
    scores = nonconformity(probabilities(stream, calibration.temperature), truth)
    calibrated_on, calibrated_truth = overconfident(400, 0)
    adaptive = AdaptiveWidth(
        nonconformity(probabilities(calibrated_on, calibration.temperature), calibrated_truth).tolist()
    )
    hits = 0
    for number, (score, true) in enumerate(zip(scores.tolist(), truth.tolist(), strict=True)):
        count = read_out(stream[number : number + 1], calibration, adaptive.width())[0]
        hits += count.low <= true <= count.high
        adaptive.observe(score)
    assert hits / len(truth) == pytest.approx(0.9, abs=0.02)
