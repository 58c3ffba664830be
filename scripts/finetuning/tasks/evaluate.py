"""One evaluation of a run: the questions of a split asked of base and tuned model, scored, and put on a page."""

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from finetuning.data.dataset import open_dataset, open_split
from finetuning.data.pictures import open_picture
from finetuning.device import open_processes
from finetuning.evaluation.answering import (
    AskedModels,
    answer_with_both,
    digest,
    read_answers,
    start_evaluation,
)
from finetuning.evaluation.frames import frame_times, near_copies, thumbnail
from finetuning.evaluation.page import Findings, write_evaluation
from finetuning.evaluation.verdict import KOREAN_OUTCOMES
from finetuning.folder_lock import give_back
from finetuning.inference.vllm_engine import refuse_vllm
from finetuning.pages import Say, Table, model_names, speak
from finetuning.run_folder import EvaluationFolder, digest_weights, find_again, open_run, untuned_model
from finetuning.tasks.base import Asked
from finetuning.tasks.count_reading import distribution_table, plan_counts, read_back, write_distributions
from finetuning.tasks.exam import TASKS, Exam, make_exam
from finetuning.training.origin import refuse_changed_run

TAUGHT = (
    "THE RUN WAS TRAINED ON THESE VERY ROWS: right answers here are memory, and say nothing of new pictures. Evaluate a "
    "held-out split (--split test) for that.",
    "바로 이 행들로 학습했습니다: 여기서 맞은 답은 외운 것이고, 새 사진에 대해서는 아무것도 말해 주지 않습니다. 학습에 쓰지 않은 "
    "스플릿(--split test)으로 평가하세요.",
)


def evaluate(args: argparse.Namespace, *, vision: bool) -> None:
    """Ask, score and show. Raises ValueError where there is no run, no split, or nothing in it that can be scored."""
    # Questions: the rows that can be scored
    state = open_processes()
    run, arguments = open_run(args.run)
    name = args.dataset or arguments["dataset_name"]
    dataset = open_dataset(args.dataset or find_again(run, name), vision=vision)
    rows = open_split(dataset, args.split, name)
    train_rows = train_rows_of(run, arguments, dataset, name, vision=vision)
    exam = make_exam(rows, train_rows, task=args.task, limit=args.limit)
    if not exam.facts:
        raise ValueError(f"{name}, split {args.split}: {exam.describe_refused()}, so there is nothing to score")
    settings = {
        "dataset": name,
        "split": args.split,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "questions_sha256": digest_questions(exam),
        "weights_sha256": digest_weights(run),
    }
    base = untuned_model(run)
    settings |= accepted_changes(run, arguments, base, args) | engine_settings(run, args)
    folder, is_headline = evaluation_folder(run, arguments, name, args.split)
    finished = start_evaluation(folder, settings, overwrite=args.overwrite)
    if not finished:
        # Answers, of both models to the same prompts, and counts from the tuned model's pass over them
        models = AskedModels(run, base, args.base_precision)
        split = arguments.get("dataset_validation_split", "validation")
        validation_rows = open_split(dataset, split, name) if split in dataset else None
        plan = None  # vLLM tells nothing of counts that it does not answer with
        if args.engine != "vllm":
            plan = plan_counts(models, exam, validation_rows, train_rows, args.batch_size)
        answers, likelihoods = answer_with_both(
            *(models, exam.questions, folder),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            trees=plan.trees if plan else None,
            engine=args.engine,
        )
        if plan is not None:
            write_distributions(models, exam, plan, likelihoods, folder, args.batch_size)
    elif state.is_main_process:
        print("This evaluation is finished already, and shown here; --overwrite makes it anew.")
        answers = read_answers(folder)
    if state.is_main_process:
        mixed_in = sets_mixed_in(run, arguments, args.split) if is_own(run, arguments, name) else []
        shown = folder.metrics()
        same_page = (shown.get("language", "en"), shown.get("mixed_in", [])) == (args.language, mixed_in)
        if not finished or not same_page:
            say = speak(args.language)
            findings = find(exam, answers, settings, model_names(say), say)
            add_distribution(findings, run, folder, say)
            add_mixed_in(findings, mixed_in, run, args.split, say)
            was_taught = is_own(run, arguments, name) and args.split == train_split(arguments)
            warning = say(*TAUGHT) if was_taught else ""
            write_evaluation(
                *(run, folder, base, findings, settings),
                language=args.language,
                is_headline=is_headline,
                warning=warning,
            )
        show(folder, is_headline=is_headline)
    give_back(folder.folder)
    state.destroy_process_group()


def add_distribution(findings: Findings, run: Path, folder: EvaluationFolder, say: Say) -> None:
    """Medians and intervals of the tuned model's counts, where the evaluation read them."""
    scores = read_back(run, folder)
    if scores is not None:
        of_count = findings.metrics.get("tasks", {}).get("count", findings.metrics)
        findings.metrics["distribution"] = scores
        findings.tables.append(distribution_table(scores, of_count["scores"]["tuned"], say))
        findings.numbers |= {f"tuned_median_{key}": scores[key] for key in ("mae", "rmse", "coverage", "width")}


def sets_mixed_in(run: Path, arguments: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """For each set of the run's `dataset_mixer`: its name, and the first verdict of its own evaluation where there is one."""
    sets = []
    for name in arguments.get("dataset_mixer") or ():
        folder, _ = evaluation_folder(run, arguments, name, split)
        sets.append({"dataset": name, "verdict": next(iter(folder.metrics().get("verdict", [])), None)})
    return sets


def add_mixed_in(findings: Findings, mixed_in: Sequence[Mapping[str, Any]], run: Path, split: str, say: Say) -> None:
    """What became of the other sets that the run was trained on, or how to find out: a score that fell is forgotten there."""
    if not mixed_in:
        return
    rows = []
    for entry in mixed_in:
        verdict = entry["verdict"]
        if verdict is None:
            command = f"--run {run} --dataset {entry['dataset']} --split {split}"
            rows.append(
                [entry["dataset"], say(f"not evaluated: {command}", f"아직 평가하지 않음: {command}"), "", "", ""]
            )
            continue
        outcome = say(verdict["outcome"], KOREAN_OUTCOMES[verdict["outcome"]])
        numbers = [f"{verdict[key]:.2f}" for key in ("base", "tuned")]
        interval = f"{verdict['low']:+.2f} ... {verdict['high']:+.2f}"
        rows.append([entry["dataset"], f"{outcome} ({verdict['measure']})", *numbers, interval])
    columns = say("dataset|verdict|base|tuned|95 % interval", "데이터셋|판정|원본 모델|미세 조정|95 % 구간").split("|")
    findings.tables.append(Table(say("Also trained on", "함께 학습한 데이터셋"), columns, rows))
    findings.metrics["mixed_in"] = list(mixed_in)


def engine_settings(run: Path, args: argparse.Namespace) -> dict[str, str]:
    """`engine` and `base_precision` where they are not the default: such answers are no continuation of others.

    Raises ValueError where they cannot be had.
    """
    changed = {"base_precision": args.base_precision} if args.base_precision else {}
    if args.engine != "vllm":
        return changed
    if changed:
        raise ValueError("--engine vllm answers in 16 or 32 bits: leave --base_precision out")
    refuse_vllm(str(run))
    return {"engine": args.engine}


def accepted_changes(
    run: Path, arguments: Mapping[str, Any], base: str, args: argparse.Namespace
) -> dict[str, list[str]]:
    """`{"accepted_changes": [...]}` where the run, its base or its own data are not what was trained, and that is accepted.

    Raises ValueError where it is not. The run's data are asked for only where its rows are.
    """
    own = find_again(run, arguments["dataset_name"])
    asks_own = args.dataset is None or is_own(run, arguments, args.dataset)
    changes = refuse_changed_run(run, base, own if asks_own else None, accept_changes=args.accept_changes)
    return {"accepted_changes": changes} if changes else {}


def train_rows_of(
    run: Path, arguments: Mapping[str, Any], dataset: DatasetDict, name: str, *, vision: bool
) -> Dataset | None:
    """The run's own train split, `dataset` (called `name`) where it is the run's; None, and a word, where it is gone."""
    own, split = arguments["dataset_name"], train_split(arguments)
    try:
        return open_split(
            dataset if is_own(run, arguments, name) else open_dataset(find_again(run, own), vision=vision), split, own
        )
    except ValueError as error:
        PartialState().print(
            f"Without trivial answers to compare with, which the run's train split would give: {error}"
        )
        return None


def train_split(arguments: Mapping[str, Any]) -> str:
    """Name of the split that the run was trained on."""
    return arguments.get("dataset_train_split", "train")


def is_own(run: Path, arguments: Mapping[str, Any], name: str) -> bool:
    """Whether the dataset `name` is the one that the run was trained on."""
    own = arguments["dataset_name"]
    return name == own or Path(name).resolve() == Path(find_again(run, own)).resolve()


def evaluation_folder(run: Path, arguments: Mapping[str, Any], name: str, split: str) -> tuple[EvaluationFolder, bool]:
    """(folder, whether its page is the run's own page).

    `evaluation/<split>` for the run's own dataset, `evaluation/<dataset>/<split>` for others. The run's own page shows
    held-out rows of its own dataset, never rows that it was trained on.
    """
    if not is_own(run, arguments, name):
        return EvaluationFolder(run, f"{Path(name).name}/{split}"), False
    return EvaluationFolder(run, split), split != train_split(arguments)


def digest_questions(exam: Exam) -> str:
    """Tells whether two evaluations asked the same: SHA-256 of the questions and of what their answers are scored by."""
    keys = ["row", "image_id", "question", "reference", *(["count"] if set(exam.tasks) == {"count"} else [])]
    facts: dict[str, Any] = {key: [fact[key] for fact in exam.facts] for key in keys}
    if "count" not in keys:
        facts |= {"task": exam.tasks, "references": [fact["references"] for fact in exam.facts]}
    return digest(facts)


def find(
    exam: Exam, answers: Mapping[str, Sequence[str]], settings: Mapping[str, Any], labels: Mapping[str, str], say: Say
) -> Findings:
    """The findings of each task of the exam, one after the other; the task with most questions first."""
    copy_of = find_copies(exam)
    times = frame_times(copy_of.values())
    parts = []
    for name, places in exam.by_task.items():
        asked = Asked(
            questions=[exam.facts[i] for i in places],
            pictures=exam.questions.select(places),
            train=exam.train.get(name, []),
            groups=[copy_of[exam.facts[i]["image_id"]] for i in places],
            settings=settings,
            num_others=len(exam.refused),
            bootstrap={"times": times, "grouped_by": say("images", "이미지")},
        )
        of_task = {model: [texts[i] for i in places] for model, texts in answers.items()}
        parts.append(TASKS[name].findings(asked, of_task, labels, say))
    return parts[0] if len(parts) == 1 else join_findings(parts, exam, say)


def find_copies(exam: Exam) -> dict[str, str]:
    """Each `image_id` -> the first one whose picture it is a near-copy of: they count as one picture.

    Of rows with several pictures the first is looked at; rows without count by their `image_id` alone.
    """
    names = [fact["image_id"] for fact in exam.facts]
    copy_of = {name: name for name in names}
    if "images" not in exam.questions.column_names:
        return copy_of
    first_place = {name: place for place, name in reversed(list(enumerate(names)))}
    places = sorted(first_place.values())

    def look(place: int) -> np.ndarray | None:
        images = exam.questions[place]["images"]
        return thumbnail(open_picture(images[0])) if images else None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # decoding pictures leaves Python's lock alone
        looks = pool.map(look, places)
        bar = tqdm(looks, total=len(places), desc="Looking for near-copies", unit="picture")
        found = {names[place]: small for place, small in zip(places, bar, strict=True) if small is not None}
    shown, thumbnails = list(found), list(found.values())
    return copy_of | {name: shown[first] for name, first in zip(shown, near_copies(thumbnails), strict=True)}


def join_findings(parts: Sequence[Findings], exam: Exam, say: Say) -> Findings:
    """Findings of several tasks as those of one page; what is called by a name gets the task's in front."""
    names = list(exam.by_task)
    lines = [
        (place, {"task": name} | line)
        for (name, places), part in zip(exam.by_task.items(), parts, strict=True)
        for place, line in zip(places, part.lines, strict=True)
    ]
    verdicts = [
        replace(v, against_base=replace(v.against_base, measure=f"{part.title}: {v.against_base.measure}"))
        for part in parts
        for v in part.verdicts
    ]
    return Findings(
        title=", ".join(part.title for part in parts),
        asked="; ".join(f"{part.title}: {part.asked}" for part in parts),
        verdicts=verdicts,
        metrics={"tasks": {name: part.metrics for name, part in zip(names, parts, strict=True)}},
        numbers={
            f"{name}_{key}": value
            for name, part in zip(names, parts, strict=True)
            for key, value in part.numbers.items()
        },
        lines=[line for _, line in sorted(lines, key=lambda pair: pair[0])],
        tables=[table for part in parts for table in part.tables],
        plots=[plot for part in parts for plot in part.plots],
        pictures={name: png for part in parts for name, png in part.pictures.items()},
        item_groups={
            f"{part.title}: {heading}": items for part in parts for heading, items in part.item_groups.items()
        },
        all_items={f"{part.title}: {heading}": items for part in parts for heading, items in part.all_items.items()},
    )


def show(folder: EvaluationFolder, *, is_headline: bool) -> None:
    """The verdict and tables of a finished evaluation, and where its files are."""
    page = folder.page_of_run if is_headline else folder.page
    print("\n" + folder.table_file.read_text(encoding="utf-8"))
    print(f"Page:     {page}\nPictures: {folder.folder}/*.png\nAnswers:  {folder.answers_file}")
