"""Rows of a counting dataset as questions to ask, and their answers as metrics and a table while training."""

from typing import Any

from datasets import Dataset

from finetuning.counting import find_count_turn, parse_count, score_counts, trivial_guesses


def counting_questions(rows: Dataset) -> list[dict[str, Any]]:
    """The rows whose own answer states the row's `count`, cut before that answer.

    Returns dicts with `messages` (ending with the question), `images`, `row`, `image_id`, `question`, `reference`
    (the row's answer) and `count`. Rows without a count, or whose answer states none, are no counting questions.
    """
    if "count" not in rows.column_names:
        return []
    questions = []
    for index, (messages, count) in enumerate(zip(rows["messages"], rows["count"], strict=True)):
        turn = None if count is None else find_count_turn(messages, count)
        if turn is not None:
            row = rows[index]
            questions.append(
                {
                    "messages": messages[:turn],
                    "images": row["images"],
                    "row": row.get("row", index),
                    "image_id": row.get("image_id"),
                    "question": messages[turn - 1]["content"],
                    "reference": messages[turn]["content"],
                    "count": count,
                }
            )
    return questions


def image_counts(rows: Dataset) -> list[int]:
    """The `count` of each picture once, however many rows ask about it; empty when the rows have none."""
    if not {"count", "image_id"} <= set(rows.column_names):
        return []
    return list(
        {key: count for key, count in zip(rows["image_id"], rows["count"], strict=True) if count is not None}.values()
    )


def score_counting_answers(
    questions: list[dict[str, Any]], answers: list[str], train_counts: list[int]
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Metrics under `count_...` (those of `score_counts` that are numbers) and the table for the trackers.

    Beside the error stands what always answering the median or mean of `train_counts` would cost
    (`count_mae_train_median`): below these lines a model has not learned to look.
    """
    counted, truth = [parse_count(answer) for answer in answers], [question["count"] for question in questions]
    scores = score_counts(counted, truth)
    metrics = {f"count_{name}": value for name, value in scores.items() if isinstance(value, (int, float))}
    if train_counts:
        for name, guess in trivial_guesses(train_counts).items():
            metrics[f"count_mae_{name}"] = score_counts([guess] * len(truth), truth)["mae"]
    table = {
        "image": [question["images"][0] for question in questions],
        "question": [question["question"] for question in questions],
        "truth": truth,
        "answer": answers,
        "answer_count": counted,
    }
    return metrics, table
