"""Scores of counts, by hand."""

import pytest

from finetuning.tasks.count_scores import (
    crowd_sizes,
    find_count_turn,
    score_by_crowd_size,
    score_counts,
    trivial_guesses,
)


def test_the_count_turn_is_the_first_answer_that_states_the_count():
    messages = [
        {"role": "user", "content": "Are there 7 people?"},
        {"role": "assistant", "content": "Let me see. The floor is wet."},
        {"role": "user", "content": "몇 명입니까?"},
        {"role": "assistant", "content": "일곱 명입니다."},
        {"role": "user", "content": "In digits?"},
        {"role": "assistant", "content": "7 people"},
    ]
    assert find_count_turn(messages, 7) == 3
    assert find_count_turn(messages, 8) is None


def test_scores_by_hand():
    scores = score_counts([5, 7, None, 12], [5, 8, 3, 10])
    assert scores == {
        "n": 4,
        "mae": 1.0,  # errors 0, -1, 2
        "rmse": pytest.approx((5 / 3) ** 0.5),
        "penalised_mae": 1.5,  # 0, 1, 3 (unparsable, costs as 0 would), 2
        "exact": 0.25,
        "within_1": 0.5,
        "within_2": 0.75,
        "bias": pytest.approx(1 / 3),
        "unparsable_rate": 0.25,
    }


def test_a_model_that_never_states_a_count_has_no_error_but_pays_the_penalty():
    scores = score_counts([None, None], [4, 6])
    assert (scores["mae"], scores["rmse"], scores["bias"]) == (None, None, None)
    assert (scores["penalised_mae"], scores["exact"], scores["unparsable_rate"]) == (5.0, 0.0, 1.0)


def test_scoring_nothing_or_unequal_lists_is_an_error():
    with pytest.raises(ValueError, match="got 0 and 0"):
        score_counts([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_counts([1], [1, 2])


def test_crowd_sizes_hold_every_item_once():
    true = [13, 14, 20, 20, 20, 31, 40, 53]
    sizes = crowd_sizes(true)
    assert sizes == [(13, 14), (20, 20), (31, 31), (40, 53)]
    by_size = score_by_crowd_size(true, true, sizes)
    assert [(part["from"], part["to"], part["n"]) for part in by_size] == [
        (13, 14, 2),
        (20, 20, 3),
        (31, 31, 1),
        (40, 53, 2),
    ]
    assert crowd_sizes([4, 4, 4, 4, 4]) == [(4, 4)]
    assert crowd_sizes([9, 2]) == [(2, 2), (9, 9)]


def test_trivial_guesses_are_whole_people():
    assert trivial_guesses([1, 2, 3, 5]) == {"train_median": 2, "train_mean": 3}  # mean 2.75
    assert trivial_guesses([2, 3]) == {"train_median": 2, "train_mean": 3}  # mean 2.5, half up
