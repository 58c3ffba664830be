"""Rows of a counting dataset as questions to ask, and their answers as metrics and a table while training."""

from typing import Any

from datasets import Dataset

from finetuning.data.pictures import open_picture
from finetuning.tasks.count_parser import parse_count
from finetuning.tasks.counting import find_count_turn, score_counts, trivial_guesses


def counting_questions(rows: Dataset) -> Dataset:
    """The rows whose own answer states the row's `count`, cut before that answer.

    `messages` then end with the question; the columns `question` and `reference` (the row's answer) are added. Rows
    without a count, or whose answer states none, are no counting questions; there may be none at all. Pictures stay
    undecoded.
    """
    if "count" not in rows.column_names:
        return rows.select([])
    messages, counts = list(rows["messages"]), list(rows["count"])
    turns = [
        None if count is None else find_count_turn(turns, count) for turns, count in zip(messages, counts, strict=True)
    ]
    cut = [dialogue[:turn] if turn else dialogue for dialogue, turn in zip(messages, turns, strict=True)]
    references = [dialogue[turn]["content"] if turn else "" for dialogue, turn in zip(messages, turns, strict=True)]
    if "image_id" not in rows.column_names:
        rows = rows.add_column("image_id", [str(number) for number in rows["row"]])
    rows = rows.remove_columns("messages").add_column("messages", cut)
    rows = rows.add_column("question", [dialogue[-1]["content"] for dialogue in cut])
    rows = rows.add_column("reference", references)
    return rows.select([index for index, turn in enumerate(turns) if turn])


def image_counts(rows: Dataset) -> list[int]:
    """The `count` of each picture once, however many rows ask about it; empty when the rows have none."""
    if not {"count", "image_id"} <= set(rows.column_names):
        return []
    return list(
        {key: count for key, count in zip(rows["image_id"], rows["count"], strict=True) if count is not None}.values()
    )


def score_counting_answers(
    questions: Dataset, answers: list[str], train_counts: list[int]
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Metrics under `count_...` (those of `score_counts` that are numbers) and the table for the trackers.

    Beside the error stands what always answering the median or mean of `train_counts` would cost
    (`count_mae_train_median`): below these lines a model has not learned to look.
    """
    counted, truth = [parse_count(answer) for answer in answers], list(questions["count"])
    scores = score_counts(counted, truth)
    metrics = {f"count_{name}": value for name, value in scores.items() if isinstance(value, (int, float))}
    if train_counts:
        for name, guess in trivial_guesses(train_counts).items():
            metrics[f"count_mae_{name}"] = score_counts([guess] * len(truth), truth)["mae"]
    table = {
        "image": [open_picture(images[0]) if images else None for images in questions["images"]],
        "question": list(questions["question"]),
        "truth": truth,
        "answer": answers,
        "answer_count": counted,
    }
    return metrics, table
