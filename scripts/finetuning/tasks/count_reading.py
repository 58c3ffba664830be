"""The tuned model's whole distribution over counts in an evaluation: medians and intervals beside the greedy answers.

What makes an interval hold is learned from the run's validation rows and kept in the run's folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from finetuning.data.count_tree import AnswerForm, CountTree, learn_forms
from finetuning.evaluation.answering import AskedModels
from finetuning.inference.count_calibration import Calibration, calibrate, read_out
from finetuning.inference.count_distribution import CountReader, largest_candidate, read_counts
from finetuning.pages import Say, Table
from finetuning.run_folder import EvaluationFolder, digest_weights, read_count_settings, write_count_settings
from finetuning.tasks.base import Question
from finetuning.tasks.count_scores import score_counts
from finetuning.tasks.exam import Exam, make_exam

CALIBRATION_ROWS = 400  # of a larger validation split, so many, evenly spread


@dataclass
class CountPlan:
    """What an evaluation reads of counts: forms of answers and the largest candidate, the calibration, each row's tree."""

    forms: dict[str, AnswerForm]
    largest: int
    calibration: Calibration
    trees: dict[int, CountTree]


def plan_counts(
    models: AskedModels,
    exam: Exam,
    validation_rows: Dataset | None,
    train_rows: Dataset | None,
    batch_size: int | str,
) -> CountPlan | None:
    """How to read the exam's counts, calibrated on validation rows by all processes; None where none asks in digits."""
    forms = forms_of(exam.train.get("count", []))
    places = exam.by_task.get("count", [])
    if not forms or not places:
        return None
    largest = largest_candidate([question["count"] for question in exam.train["count"]])
    reader = CountReader(models.load("tuned"), models.processing_class, forms, largest)
    calibration = calibrate_on(reader, validation_rows, train_rows, batch_size)
    trees = reader.trees_of(exam.questions)
    return CountPlan(forms, largest, calibration, {place: trees[place] for place in places if place in trees})


def write_distributions(
    models: AskedModels,
    exam: Exam,
    plan: CountPlan,
    likelihoods: Mapping[int, list[float]],
    folder: EvaluationFolder,
    batch_size: int | str,
) -> None:
    """Write `folder`'s counts.jsonl: of each row of the plan its median, interval and probability.

    `likelihoods` are those that were read with the answers; rows answered before a stop are read now, by all processes.
    """
    found = dict(likelihoods)
    missing = [place for place in plan.trees if place not in found]
    if missing:
        reader = CountReader(models.load("tuned"), models.processing_class, plan.forms, plan.largest)
        rows = exam.questions.select(missing)
        read = read_counts(reader, rows, batch_size=batch_size, description="Reading counts")
        found |= zip(missing, read, strict=True)
    if PartialState().is_main_process:
        write_count_settings(
            models.run, count_settings(plan.forms, plan.largest, plan.calibration, digest_weights(models.run))
        )
        places = sorted(plan.trees)
        counts = read_out(torch.tensor([found[place] for place in places]), plan.calibration)
        folder.write_counts(
            [
                {key: exam.facts[place][key] for key in ("row", "image_id", "question")}
                | {"truth": exam.facts[place]["count"]}
                | asdict(count)
                for place, count in zip(places, counts, strict=True)
            ]
        )


def forms_of(train: Sequence[Question]) -> dict[str, AnswerForm]:
    """How the answers of training state a count, by question."""
    columns = [[question[key] for question in train] for key in ("question", "reference", "count")]
    return learn_forms(*columns)


def calibrate_on(
    reader: CountReader, validation_rows: Dataset | None, train_rows: Dataset | None, batch_size: int | str
) -> Calibration:
    """Temperature and width from the run's validation rows; none where there are none."""
    if validation_rows is None or not len(validation_rows):
        return Calibration()
    exam = make_exam(validation_rows, train_rows, limit=CALIBRATION_ROWS)
    places = exam.by_task.get("count", [])
    if not places:
        return Calibration()
    likelihoods = read_counts(reader, exam.questions.select(places), batch_size=batch_size, description="Calibrating")
    found = [(values, exam.facts[place]["count"]) for place, values in zip(places, likelihoods, strict=True) if values]
    if not found:
        return Calibration()
    return calibrate(torch.tensor([values for values, _ in found]), torch.tensor([count for _, count in found]))


def count_settings(
    forms: dict[str, AnswerForm], largest: int, calibration: Calibration, weights: str
) -> dict[str, Any]:
    """What `generate.py --counts` needs of this evaluation, as JSON holds it."""
    return {
        "weights_sha256": weights,
        "forms": {question: asdict(form) for question, form in forms.items()},
        "largest": largest,
        "calibration": calibration.as_dict(),
    }


def distribution_scores(lines: Sequence[dict[str, Any]], note: str) -> dict[str, Any]:
    """`score_counts` of the medians, and of the intervals their `coverage` (a share) and mean `width` in people."""
    truth = [line["truth"] for line in lines]
    covered = sum(line["low"] <= line["truth"] <= line["high"] for line in lines)
    return score_counts([line["count"] for line in lines], truth) | {
        "coverage": covered / len(lines),
        "width": sum(line["high"] - line["low"] for line in lines) / len(lines),
        "note": note,
    }


def distribution_table(scores: dict[str, Any], greedy: dict[str, Any], say: Say) -> Table:
    """Greedy answers beside medians of the distribution."""

    def row(name: str, part: dict[str, Any]) -> list[str]:
        numbers = ["" if part.get(key) is None else f"{part[key]:.2f}" for key in ("mae", "rmse")]
        share = f"{part['coverage']:.1%}" if "coverage" in part else ""
        return [name, *numbers, share, f"{part['width']:.1f}" if "width" in part else ""]

    return Table(
        say("Tuned model: greedy and median", "튜닝 모델: 한 답과 중앙값"),
        ["", "MAE", "RMSE", say("truth in the interval", "정답이 구간 안"), say("width", "구간 폭")],
        [row(say("greedy answer", "한 답"), greedy), row(say("median of all counts", "모든 수의 중앙값"), scores)],
        say(
            f"The median and the 90 % interval of the model's distribution over all counts; {scores['note']}.",
            f"모든 사람 수에 대한 모델 분포의 중앙값과 90 % 구간입니다. {scores['note']}.",
        ),
    )


def read_back(run: Path, folder: EvaluationFolder) -> dict[str, Any] | None:
    """`distribution_scores` of an evaluation's counts.jsonl; None where it has none."""
    lines = folder.read_counts()
    if not lines:
        return None
    return distribution_scores(lines, read_count_settings(run).get("calibration", {}).get("note", ""))
