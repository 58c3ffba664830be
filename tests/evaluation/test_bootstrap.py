"""The verdict finds a planted change, and finds none where there is none."""

import numpy as np
import pytest

from finetuning.evaluation.bootstrap import compare
from finetuning.evaluation.verdict import Verdict
from finetuning.evaluation.verdict import describe as describe_verdict
from finetuning.pages import speak


def describe(difference):
    return describe_verdict(Verdict(difference), speak("en"))


def interval(base, tuned, groups=None, **settings):
    groups = range(len(base)) if groups is None else groups
    return compare("MAE", base, tuned, groups, lower_is_better=True, unit="people", **settings)


def test_identical_answers_are_no_measurable_change():
    errors = [3.0, 0.0, 5.0, 2.0] * 10
    difference = interval(errors, errors)
    assert (difference.difference, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert describe(difference) == (
        "No measurable change: MAE went from 2.50 to 2.50 people (a change of +0.00, 95 % interval +0.00 to +0.00, "
        "over 40 images, which includes 0)."
    )


def test_noise_is_no_measurable_change():
    rng = np.random.default_rng(1)
    errors = rng.normal(10, 3, 200)
    assert interval(errors, errors + rng.normal(0, 1, 200)).outcome == "no measurable change"


def test_a_planted_improvement_is_found_and_its_mirror_is_worse():
    rng = np.random.default_rng(2)
    base = rng.normal(10, 3, 200)
    tuned = base - 1 + rng.normal(0, 2, 200)
    assert interval(base, tuned).outcome == "better"
    assert interval(tuned, base).outcome == "worse"
    assert describe(interval(base, tuned)).startswith("Better: MAE went from 9.98 to 8.89 people (a change of -1.09, ")
    higher = compare("exact", base, tuned, range(200), lower_is_better=False)
    assert higher.outcome == "worse"


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(3)
    change = rng.normal(-0.5, 2, 400)
    difference = interval(np.zeros(400), change)
    half_width = 1.96 * change.std() / np.sqrt(400)
    assert difference.low == pytest.approx(change.mean() - half_width, abs=0.02)
    assert difference.high == pytest.approx(change.mean() + half_width, abs=0.02)
    assert interval(np.zeros(400), change) == difference  # the same seed, the same interval


def test_questions_about_one_image_are_not_counted_as_independent():
    rng = np.random.default_rng(4)
    change = np.repeat(rng.normal(0, 1, 50), 8)  # eight questions about each image, all with the same error
    images = np.repeat(np.arange(50), 8).tolist()
    by_item, by_image = interval(np.zeros(400), change), interval(np.zeros(400), change, images)
    assert by_image.num_groups == 50
    ratio = (by_image.high - by_image.low) / (by_item.high - by_item.low)
    assert ratio == pytest.approx(np.sqrt(8), rel=0.05)


def test_images_with_more_questions_weigh_more():
    difference = interval([0, 0, 0, 0], [1, 1, 1, 5], ["a", "a", "a", "b"])
    assert difference.difference == 2.0
    assert (difference.low, difference.high) == (1.0, 5.0)  # drawn twice: only a, or only b


def test_a_handful_of_images_decides_nothing():
    difference = interval([5.0] * 9, [0.0] * 9)
    assert difference.outcome == "too few to tell"
    assert describe(difference).startswith("Too few to tell: MAE went from 5.00 to 0.00 people (but 9 images")
    assert interval([5.0] * 10, [0.0] * 10).outcome == "better"


def test_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="got 1, 2, 1"):
        interval([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="got 0, 0, 0"):
        interval([], [])
