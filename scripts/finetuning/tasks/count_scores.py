"""Scores of numbers of people read from answers. Standard library only."""

import math
import statistics

from finetuning.tasks.count_parser import parse_count


def find_count_turn(messages: list[dict], count: int) -> int | None:
    """Index of the first assistant message whose text states exactly `count` people, or None when no message does.

    Evaluation asks the conversation up to that message; a row without one is not a counting question.
    """
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and parse_count(message["content"]) == count:
            return index
    return None


def score_counts(predicted: list[int | None], true: list[int]) -> dict:
    """Scores of predicted counts against the true ones, in people; an unparsable prediction is None.

    - `n`: items
    - `mae`, `rmse`, `bias` (mean of predicted minus true): over the parsed predictions, None when there is none
    - `penalised_mae`: over all items; an unparsable answer costs as much as answering 0, so that refusing hard items
      never pays
    - `exact`, `within_1`, `within_2`: shares of all items, from 0 to 1; an unparsable answer is wrong
    - `unparsable_rate`: share of all items

    ValueError when there are no items or the lengths differ.
    """
    if not true or len(predicted) != len(true):
        raise ValueError(
            f"expected as many predictions as true counts, at least one; got {len(predicted)} and {len(true)}"
        )
    errors = [guess - truth for guess, truth in zip(predicted, true, strict=True) if guess is not None]
    penalised = [abs((guess or 0) - truth) for guess, truth in zip(predicted, true, strict=True)]
    n = len(true)
    return {
        "n": n,
        "mae": statistics.fmean(map(abs, errors)) if errors else None,
        "rmse": math.sqrt(statistics.fmean(error**2 for error in errors)) if errors else None,
        "penalised_mae": statistics.fmean(penalised),
        "exact": sum(error == 0 for error in errors) / n,
        "within_1": sum(abs(error) <= 1 for error in errors) / n,
        "within_2": sum(abs(error) <= 2 for error in errors) / n,
        "bias": statistics.fmean(errors) if errors else None,
        "unparsable_rate": (n - len(errors)) / n,
    }


def crowd_sizes(true: list[int], num_sizes: int = 4) -> list[tuple[int, int]]:
    """Ranges of people, both ends included, that cut the items into about equal parts: [(13, 26), (27, 31), ...].

    The cuts are quantiles of the true counts; there are fewer ranges when many items share one count, none is empty.
    """
    if not true:
        raise ValueError("crowd sizes need at least one true count")
    counts = sorted(true)
    highest = sorted({counts[max(0, len(counts) * part // num_sizes - 1)] for part in range(1, num_sizes + 1)})
    lowest = [counts[0], *(min(count for count in counts if count > high) for high in highest[:-1])]
    return list(zip(lowest, highest, strict=True))


def score_by_crowd_size(predicted: list[int | None], true: list[int], sizes: list[tuple[int, int]]) -> list[dict]:
    """`score_counts` within each range of true counts, with the range as `from` and `to`; empty ranges are left out."""
    scores = []
    for low, high in sizes:
        inside = [(guess, truth) for guess, truth in zip(predicted, true, strict=True) if low <= truth <= high]
        if inside:
            scores.append({"from": low, "to": high} | score_counts(*map(list, zip(*inside, strict=True))))
    return scores


def trivial_guesses(train_counts: list[int]) -> dict[str, int]:
    """What one would answer without looking: the `train_median` and `train_mean` of the counts, one per training image.

    Both are whole, as a count of people is: the median is the lower of two middle counts, the mean is rounded half up.
    """
    if not train_counts:
        raise ValueError("the trivial guesses need at least one training count")
    return {
        "train_median": statistics.median_low(train_counts),
        "train_mean": math.floor(statistics.fmean(train_counts) + 0.5),
    }
