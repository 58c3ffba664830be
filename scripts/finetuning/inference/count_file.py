"""Counts of many pictures into a JSONL file, read as the run's last evaluation calibrated them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from finetuning.data.count_tree import AnswerForm
from finetuning.failures import writing
from finetuning.inference.count_calibration import Calibration, read_out
from finetuning.inference.count_distribution import CountReader, read_counts
from finetuning.run_folder import digest_weights, read_count_settings

ROWS_A_WRITE = 256
NO_COUNT = {"count": None, "low": None, "high": None, "probability": None}


def settings_of(run: Path) -> tuple[dict[str, AnswerForm], int, Calibration]:
    """(forms of answers, largest candidate, calibration) that the run's last evaluation kept.

    ValueError where none is kept, or the run's weights are others now.
    """
    kept, remedy = read_count_settings(run), f"python scripts/evaluate_llava.py --run {run} --overwrite"
    if not kept:
        raise ValueError(f"{run}: counts need what an evaluation of the run keeps: {remedy}")
    if kept["weights_sha256"] != digest_weights(run):
        raise ValueError(f"{run}: its counts were calibrated for other weights: {remedy}")
    values = {key: value for key, value in kept["calibration"].items() if key != "note"}
    forms = {question: AnswerForm(**form) for question, form in kept["forms"].items()}
    return forms, kept["largest"], Calibration(**values)


def write_counts(
    reader: CountReader,
    calibration: Calibration,
    items: Sequence[tuple[str | None, str]],
    rows: Sequence[dict[str, Any]],
    output: Path,
    *,
    batch_size: int | str,
) -> None:
    """A line per item appended to `output`: image, question, count, interval (`low`, `high`), the count's probability.

    All are null where the question is none that training asked for a count.
    """
    with writing(output), output.open("a", encoding="utf-8") as file:
        for start in range(0, len(items), ROWS_A_WRITE):
            places = range(start, min(start + ROWS_A_WRITE, len(items)))
            likelihoods = read_counts(reader, [rows[place] for place in places], batch_size=batch_size)
            known = [values for values in likelihoods if values is not None]
            counts = iter(read_out(torch.tensor(known), calibration) if known else [])
            if PartialState().is_main_process:
                for place, values in zip(places, likelihoods, strict=True):
                    image, question = items[place]
                    count = NO_COUNT if values is None else asdict(next(counts))
                    file.write(json.dumps({"image": image, "question": question} | count, ensure_ascii=False) + "\n")
                file.flush()


def widest(output: Path, number: int) -> list[dict[str, Any]]:
    """The `number` lines of `write_counts` with the widest intervals, for a person to look at."""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    counted = [line for line in lines if line["count"] is not None]
    return sorted(counted, key=lambda line: line["low"] - line["high"])[:number]
