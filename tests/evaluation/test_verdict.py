"""Better than the base is not enough: the verdict names the trivial answer that does as well, or better."""

import numpy as np
import pytest

from finetuning.evaluation.verdict import BEATEN, MATCHED, describe, judge
from finetuning.pages import speak


def errors(mean, seed):
    return np.random.default_rng(seed).normal(mean, 1.0, 200)


def verdict(base, tuned, trivial):
    values = {"base": errors(base, 1), "tuned": errors(tuned, 2), "train_median": errors(trivial, 3)}
    names = {"train_median": "always 31 (train median)"}
    return judge("mean absolute error", values, range(200), lower_is_better=True, trivial=names, unit="people")


@pytest.mark.parametrize(
    ("base", "tuned", "trivial", "outcome"),
    [
        (12, 2, 3.4, "better"),
        (12, 5, 3.4, BEATEN),
        (12, 3.4, 3.4, MATCHED),
        (5, 9, 3.4, "worse"),
        (9, 9, 3.4, "no measurable change"),
    ],
)
def test_the_outcome_is_against_the_base_and_the_best_trivial_answer(base, tuned, trivial, outcome):
    assert verdict(base, tuned, trivial).outcome == outcome


def test_a_model_that_always_gives_the_commonest_answer_is_not_called_better():
    right = [float(number % 10 < 7) * 100 for number in range(200)]  # yes is right for 7 of 10
    values = {"base": [100 - value for value in right], "tuned": right, "always_yes": right}
    found = judge(
        "answers right", values, range(200), lower_is_better=False, trivial={"always_yes": "always yes"}, unit="%"
    )
    assert found.outcome == MATCHED
    text = describe(found, speak("en"))
    assert text.startswith("Matched by a trivial answer: answers right went from 30.00 to 70.00 %")
    assert "Always yes would score 70.00 %" in text and "etter" not in text
    assert describe(found, speak("ko")).startswith("보지 않고 하는 답과 다르지 않습니다: answers right 30.00 → 70.00 %")


def test_the_best_of_several_trivial_answers_counts():
    values = {"base": [9.0] * 20, "tuned": [4.0] * 20, "mean": [5.0] * 20, "median": [3.0] * 20}
    found = judge("MAE", values, range(20), lower_is_better=True, trivial={"mean": "the mean", "median": "the median"})
    assert (found.outcome, found.trivial) == (BEATEN, "the median")
    assert found.as_dict()["trivial"]["base"] == 3.0
