"""Which task a row is, the questions of a split as one exam, and its scores while training."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset

from finetuning.data.count_tree import learn_forms
from finetuning.data.dataset import spread
from finetuning.data.pictures import open_picture
from finetuning.inference.count_calibration import medians, probabilities, ranked_score
from finetuning.inference.count_distribution import CountReader, largest_candidate, read_counts
from finetuning.pages import AnswerTable
from finetuning.tasks.base import Question, Task, Unscorable
from finetuning.tasks.choice import Choice, parse_choice, read_options
from finetuning.tasks.count import Count
from finetuning.tasks.count_scores import score_counts
from finetuning.tasks.free_text import FreeText
from finetuning.tasks.number import Number, parse_number
from finetuning.tasks.short_answer import ShortAnswer
from finetuning.tasks.yes_no import YesNo, parse_yes_no

if TYPE_CHECKING:  # the Trainer comes with them, which the check of a dataset does not need
    from finetuning.arguments import ScriptArguments

TASKS: dict[str, Task] = {task.name: task for task in (Count(), YesNo(), Choice(), Number(), ShortAnswer(), FreeText())}
MAX_TRAIN_ROWS = 20_000  # of a larger train split, so many rows, evenly spread, say which task it is and what is common
# A dataset without a column that tells is a task when at least this share of its train answers are of that kind.
ENOUGH = 0.8
SHORT = 5  # words of a short answer, at most; a number may come with a few more


@dataclass(frozen=True)
class Assignment:
    """The task of each row: `task` for all of them, or where it is None what the column `task` says."""

    task: str | None
    evidence: str


def assign(train_rows: Sequence[Question], given: str | None = None) -> Assignment:
    """Which task the rows of a dataset are: `given` by the recipe, else by their columns.

    One decision for the whole dataset. Raises ValueError for a task that does not exist.
    """
    known = ", ".join(TASKS)
    if given is not None:
        if given not in TASKS:
            raise ValueError(f"task {given!r} does not exist; the tasks are {known}")
        return Assignment(given, f"task {given}, as the recipe says")
    named = Counter(row["task"] for row in train_rows if row.get("task") is not None)
    if unknown := sorted(set(named) - set(TASKS)):
        raise ValueError(f"the column task names {', '.join(map(repr, unknown))}; the tasks are {known}")
    if named:
        shares = ", ".join(f"{name} ({number:,} of {len(train_rows):,} rows)" for name, number in named.most_common())
        return Assignment(None, f"tasks by the column task: {shares}")
    counted = sum(row.get("count") is not None for row in train_rows)
    if counted:
        return Assignment("count", f"task count: {counted:,} of {len(train_rows):,} rows have a count")
    return read_off(train_rows)


def read_off(rows: Sequence[Question]) -> Assignment:
    """The task that the answers of most rows look like: the first of `KINDS` that ENOUGH of them are, else free_text."""
    answers = []
    for row in rows:
        with contextlib.suppress(Unscorable):
            turn = TASKS["free_text"].turn(row)
            answers.append((row["messages"][turn - 1]["content"], row["messages"][turn]["content"]))
    seen = []
    for name, words, fits in KINDS:
        number = sum(fits(question, answer) for question, answer in answers)
        share = f"{number:,} of {len(rows):,} train answers {words} ({number / max(len(rows), 1):.0%})"
        if answers and number >= ENOUGH * len(rows):
            return Assignment(name, f"task {name}, read off the data: {share}")
        seen.append(share)
    return Assignment(
        "free_text", f"task free_text, as no other fits {ENOUGH:.0%} of the train answers: only {'; '.join(seen)}"
    )


def is_choice(question: str, answer: str) -> bool:
    """Whether the question has options and the answer is one of them."""
    options = read_options(question)
    return bool(options) and parse_choice(answer, options) is not None


KINDS: tuple[tuple[str, str, Callable[[str, str], bool]], ...] = (
    ("choice", "choose an option that the question lists", is_choice),
    ("yes_no", "begin with yes or no", lambda _, answer: parse_yes_no(answer) is not None),
    (
        "number",
        "are one number",
        lambda _, answer: len(answer.split()) <= SHORT + 3 and parse_number(answer) is not None,
    ),
    ("short_answer", f"are at most {SHORT} words", lambda _, answer: len(answer.split()) <= SHORT),
)


@dataclass
class Exam:
    """Questions of one split, each of one task, and how their answers are scored.

    `questions` has `messages` that end with the question, and `images`; `facts` the same rows without pictures;
    `tasks` the name of each one's task; `train` the questions of the run's train split by task; `refused` the rows that
    cannot be scored: (row, reason).
    """

    questions: Dataset
    facts: list[Question]
    tasks: list[str]
    train: dict[str, list[Question]]
    refused: list[tuple[int, str]]
    evidence: str

    @property
    def by_task(self) -> dict[str, list[int]]:
        """Places of the questions of each task, the task with most questions first."""
        return {
            name: [i for i, task in enumerate(self.tasks) if task == name]
            for name, _ in Counter(self.tasks).most_common()
        }

    @property
    def headlines(self) -> dict[str, str]:
        """Metric -> what to call it, for progress.json and status.py."""
        return dict(TASKS[name].headline for name in self.by_task)

    def score(self, answers: Sequence[str]) -> tuple[dict[str, float], AnswerTable]:
        """(metrics without the `eval_` prefix, the table for the trackers) of one answer for each question.

        `score` is the mean over the tasks of their skill: 0 for the best trivial answer, 1 for perfect. Higher is better
        whatever the task, so that recipes can keep the best checkpoint by it.
        """
        metrics: dict[str, float] = {}
        scores: list[dict[str, float]] = [{}] * len(answers)
        for name, places in self.by_task.items():
            task, asked, given = TASKS[name], [self.facts[i] for i in places], [answers[i] for i in places]
            of_task = task.scores(asked, given)
            metrics |= task.metrics(asked, given, of_task, self.train.get(name, []))
            for place, score in zip(places, of_task, strict=True):
                scores[place] = score
        metrics["score"] = statistics.fmean(TASKS[name].skill(metrics) for name in self.by_task)
        return metrics, self._table(answers, scores)

    def score_distributions(self, model: Any, processing_class: Any, batch_size: int) -> dict[str, float]:
        """Metrics of the model's whole distribution over counts, on the counting questions of the exam; {} without any.

        `count_median_mae` and `count_median_rmse` are of its medians, `count_crps` is its ranked probability score, all
        in people.
        """
        train, places = self.train.get("count", []), self.by_task.get("count", [])
        forms = learn_forms(*[[question[key] for question in train] for key in ("question", "reference", "count")])
        if not forms or not places:
            return {}
        reader = CountReader(model, processing_class, forms, largest_candidate([row["count"] for row in train]))
        rows = self.questions.select(places)
        read = zip(read_counts(reader, rows, batch_size=batch_size), places, strict=True)
        found = [(values, self.facts[place]["count"]) for values, place in read if values is not None]
        if not found:
            return {}
        likelihoods, truth = torch.tensor([values for values, _ in found]), [count for _, count in found]
        distribution = probabilities(likelihoods)
        scores = score_counts(medians(distribution).tolist(), truth)
        return {
            "count_median_mae": scores["mae"],
            "count_median_rmse": scores["rmse"],
            "count_crps": ranked_score(distribution, torch.tensor(truth)),
        }

    def _table(self, answers: Sequence[str], scores: Sequence[dict[str, float]]) -> AnswerTable:
        columns: dict[str, list[Any]] = {}
        if "images" in self.questions.column_names:
            columns["image"] = [open_picture(images[0]) if images else None for images in self.questions["images"]]
        columns["question"] = [fact["question"] for fact in self.facts]
        answered = list(zip([TASKS[name] for name in self.tasks], self.facts, answers, scores, strict=True))
        if len(set(self.tasks)) == 1:
            columns |= answered[0][0].table(self.facts, answers, scores)
        else:
            columns["task"] = list(self.tasks)
            columns["truth"] = [task.truth(fact) for task, fact, _, _ in answered]
            columns["answer"] = list(answers)
        captions = [(task.caption(fact, answer), task.is_right(score)) for task, fact, answer, score in answered]
        return AnswerTable(columns, captions)

    def describe_refused(self) -> str:
        """Why rows cannot be scored, for people."""
        return reasons(self.refused)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The last evaluation of a run in words. `metrics` are named as in metrics.json, with `eval_`."""
        plain = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        measured = [name for name in self.by_task if f"{name}_n" in plain]
        return "; ".join(TASKS[name].sentence(plain) for name in measured) or "no answer was scored while training"


def rows_without_pictures(rows: Dataset) -> list[Question]:
    """Plain rows, each with its `row` and `image_id`; no picture is read."""
    plain = rows.remove_columns("images") if "images" in rows.column_names else rows
    return [row | {"image_id": str(row.get("image_id", row["row"]))} for row in plain.to_list()]


def find_questions(
    rows: Sequence[Question], assignment: Assignment
) -> tuple[list[Question], list[str], list[tuple[int, str]]]:
    """(questions, the task of each, [(row, why it cannot be scored)]).

    A question is its row with `messages` cut before the answer, `question`, `reference` (the answer that was cut) and
    `references` (the column `answers`, else that one answer).
    """
    questions, tasks, refused = [], [], []
    for row in rows:
        name = assignment.task or row.get("task")
        if name is None:
            refused.append((row["row"], "its column task is empty"))
            continue
        try:
            turn = TASKS[name].turn(row)
        except Unscorable as reason:
            refused.append((row["row"], str(reason)))
            continue
        reference = row["messages"][turn]["content"]
        cut = {
            "messages": row["messages"][:turn],
            "question": row["messages"][turn - 1]["content"],
            "reference": reference,
            "references": list(row.get("answers") or [reference]),
        }
        questions.append(row | cut)
        tasks.append(name)
    return questions, tasks, refused


def make_exam(rows: Dataset, train_rows: Dataset | None, *, task: str | None = None, limit: int | None = None) -> Exam:
    """The exam of a split: every row that can be scored, at most `limit`, evenly spread.

    `train_rows` is the run's own train split: what its rows are decides what `rows` are, and its commonest answers are
    the trivial ones. None where it is not at hand: then `rows` decide, and there are no trivial answers.
    """
    plain = rows_without_pictures(rows)
    train = [] if train_rows is None else rows_without_pictures(spread(train_rows, MAX_TRAIN_ROWS))
    assignment = assign(train or plain, task)
    facts, tasks, refused = find_questions(plain, assignment)
    train_facts, train_tasks, _ = find_questions(train, assignment)
    by_task = {
        name: [f for f, t in zip(train_facts, train_tasks, strict=True) if t == name] for name in set(train_tasks)
    }
    place_of = {row["row"]: place for place, row in enumerate(plain)}
    places = [place_of[fact["row"]] for fact in facts]
    if limit is not None:
        kept = list(spread(Dataset.from_dict({"place": range(len(facts))}), limit)["place"])
        facts, tasks, places = [facts[i] for i in kept], [tasks[i] for i in kept], [places[i] for i in kept]
    questions = rows.select(places)
    if facts:  # datasets cannot add a column to nothing
        # To all rows, then chosen: of chosen rows the library would first write a copy, pictures and all, beside the data.
        messages: list[list[dict[str, Any]]] = [[] for _ in range(len(rows))]
        for place, fact in zip(places, facts, strict=True):
            messages[place] = fact["messages"]
        questions = rows.remove_columns("messages").add_column("messages", messages).select(places)
    return Exam(questions, facts, tasks, by_task, refused, assignment.evidence)


def counting_questions(train_rows: Dataset, task: str | None = None) -> list[Question]:
    """The counting questions among the train split's rows, an even choice of them where there are many."""
    plain = rows_without_pictures(spread(train_rows, MAX_TRAIN_ROWS))
    facts, tasks, _ = find_questions(plain, assign(plain, task))
    return [fact for fact, name in zip(facts, tasks, strict=True) if name == "count"]


def scoring_of(
    splits: Mapping[str, Dataset], train: str, task: str | None
) -> tuple[str, dict[str, tuple[int, list[tuple[int, str]]]]]:
    """(evidence of the task, split -> (rows that can be scored, [(row, why it cannot)])); no picture is read."""
    decided_by = splits.get(train, next(iter(splits.values())))
    assignment = assign(rows_without_pictures(spread(decided_by, MAX_TRAIN_ROWS)), task)
    found = {}
    for name, rows in splits.items():
        questions, _, refused = find_questions(rows_without_pictures(rows), assignment)
        found[name] = (len(questions), refused)
    return assignment.evidence, found


def reasons(refused: Sequence[tuple[int, str]], shown: int = 5) -> str:
    """Why rows cannot be scored: each reason once, with how many rows it holds for and the first of them."""
    rows: dict[str, list[int]] = {}
    for row, reason in refused:
        rows.setdefault(reason, []).append(row)
    return "; ".join(
        f"{len(numbers):,} rows cannot be scored: {reason} (row {', '.join(map(str, numbers[:3]))}"
        f"{', ...' if len(numbers) > 3 else ''})"
        for reason, numbers in sorted(rows.items(), key=lambda pair: -len(pair[1]))[:shown]
    )


def open_exam(script_args: "ScriptArguments", train_rows: Dataset, validation_rows: Dataset | None) -> Exam | None:
    """What a training is asked at each evaluation; None without a validation split, or with `eval_answers: 0`.

    Says which task the rows are and how many can be scored. Raises ValueError where none can.
    """
    if validation_rows is None or script_args.eval_answers == 0:
        return None
    exam = make_exam(validation_rows, train_rows, task=script_args.task, limit=script_args.eval_answers)
    split = script_args.dataset_validation_split
    if not exam.facts:
        raise ValueError(
            f"{script_args.dataset_name}, split {split}: not one of {len(validation_rows):,} rows can be scored "
            f"({exam.evidence}). {exam.describe_refused()}. Correct the rows, name their task (--task, or a column task), "
            "or train without asking: --eval_answers 0"
        )
    scored = len(validation_rows) - len(exam.refused)
    PartialState().print(f"{exam.evidence}; split {split}: {scored:,} of {len(validation_rows):,} rows can be scored")
    if exam.refused:
        PartialState().print(exam.describe_refused())
    return exam
