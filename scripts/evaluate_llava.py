"""How well does a run count people, and did training help? Asks base and tuned model about held-out pictures.

    python scripts/evaluate_llava.py --run outputs/llava-sample
    accelerate launch scripts/evaluate_llava.py --run outputs/llava-qlora --dataset data/cctv --split test --batch_size 16

Writes outputs/<run>/evaluation/<split>/ (metrics.json, answers.jsonl, table.md, pictures) and outputs/<run>/report.html,
a page that opens in any browser. Stopped half way, the same command continues; finished, it shows what is there.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict

from finetuning.data.dataset import open_dataset, open_split, spread
from finetuning.data.pictures import open_picture
from finetuning.evaluation.answering import (
    answer_with_both,
    digest,
    finish_evaluation,
    log_to_wandb,
    start_evaluation,
)
from finetuning.evaluation.bootstrap import compare, describe
from finetuning.evaluation.plots import error_by_crowd_size, loss_curves, predicted_against_true
from finetuning.evaluation.report import Item, Plot, Table, write_report
from finetuning.run_folder import digest_weights, find_again, open_run, read_log_history, untuned_model
from finetuning.tasks.count_parser import parse_count
from finetuning.tasks.counting import crowd_sizes, score_by_crowd_size, score_counts, trivial_guesses
from finetuning.tasks.questions import counting_questions, image_counts

SHOWN = 6  # items in each group of the report


def main(args: argparse.Namespace) -> None:
    # Questions: the rows whose own answer states the count
    run, arguments = open_run(args.run)
    name = args.dataset or arguments["dataset_name"]
    dataset = open_dataset(args.dataset or find_again(run, name), vision=True)
    rows = open_split(dataset, args.split, name)
    questions = questions_of(rows, f"{name}, split {args.split}")
    num_others = len(rows) - len(questions)
    questions = questions if args.limit is None else spread(questions, args.limit)
    facts = {key: list(questions[key]) for key in ("row", "image_id", "question", "reference", "count")}
    settings = {
        "dataset": name,
        "split": args.split,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "questions_sha256": digest(facts),
        "weights_sha256": digest_weights(run),
    }
    folder = run / "evaluation" / args.split
    state = PartialState()
    if not start_evaluation(folder, settings, overwrite=args.overwrite):
        # Answers, of both models to the same prompts
        base = untuned_model(run)
        answers = answer_with_both(
            run, base, questions, folder, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
        )
        if state.is_main_process:
            write_evaluation(run, folder, base, dataset, questions, facts, answers, settings, num_others)
    elif state.is_main_process:
        print("This evaluation is finished already, and shown here; --overwrite makes it anew.")
    if state.is_main_process:
        print("\n" + (folder / "table.md").read_text(encoding="utf-8"))
        print(f"Page:     {run / 'report.html'}\nPictures: {folder}/*.png\nAnswers:  {folder / 'answers.jsonl'}")
    state.destroy_process_group()


def questions_of(rows: Dataset, name: str) -> Dataset:
    """`counting_questions` of at least one row, or a ValueError that says why there is none."""
    if "count" not in rows.column_names:
        raise ValueError(f"{name}: no column 'count' to score against. prepare_cctv.py writes one from labels.csv")
    questions = counting_questions(rows)
    if not len(questions):
        raise ValueError(
            f"{name}: in none of {len(rows)} rows does an answer state the row's count, so there is nothing to score"
        )
    return questions


def write_evaluation(
    run: Path,
    folder: Path,
    base: str,
    dataset: DatasetDict,
    questions: Dataset,
    facts: dict[str, list],
    answers: dict[str, list[str]],
    settings: dict[str, Any],
    num_others: int,
) -> None:
    """Scores, verdict, tables, pictures, page."""
    true, images = facts["count"], facts["image_id"]
    counts = {model: [parse_count(answer) for answer in answers[model]] for model in ("base", "tuned")}
    train_counts = image_counts(dataset["train"]) if "train" in dataset else []
    guesses = trivial_guesses(train_counts) if train_counts else {}
    predicted = counts | {guess: [value] * len(true) for guess, value in guesses.items()}
    scores = {model: score_counts(values, true) for model, values in predicted.items()}
    sizes = crowd_sizes(true)
    by_size = {model: score_by_crowd_size(values, true, sizes) for model, values in predicted.items()}

    # Verdict
    errors = {
        model: [abs((guess or 0) - truth) for guess, truth in zip(counts[model], true, strict=True)] for model in counts
    }
    exact = {model: [100.0 * (error == 0) for error in errors[model]] for model in errors}
    all_parsed = not any(scores[model]["unparsable_rate"] for model in counts)
    measure = "mean absolute error" if all_parsed else "mean absolute error (unparsable answers taken as 0)"
    verdict = [
        compare(measure, errors["base"], errors["tuned"], images, lower_is_better=True, unit="people"),
        compare("exactly right", exact["base"], exact["tuned"], images, lower_is_better=False, unit="%"),
    ]
    sentences = [describe(difference) for difference in verdict]

    # Tables and pictures
    labels = {"base": "base", "tuned": "tuned"} | {
        guess: f"always {value} ({guess.replace('_', ' ')})" for guess, value in guesses.items()
    }
    tables = [score_table(scores, labels), crowd_table(by_size, labels)]
    dots = "Each dot is a question, larger where several coincide; on the line the answer is right."
    plots = [
        Plot(f"Predicted against true, {model}", predicted_against_true(true, {model: counts[model]}), dots)
        for model in counts
    ]
    bars = {
        "reference" if model == "train_median" else model: [part["penalised_mae"] for part in parts]
        for model, parts in by_size.items()
        if model != "train_mean"
    }
    crowd = error_by_crowd_size(sizes, bars, "mean absolute error")
    plots.append(Plot("Error by crowd size", crowd, "Unparsable answers are taken as 0."))
    loss = loss_curves(read_log_history(run))
    if loss is not None:
        plots.append(Plot("Loss while training", loss, "Per supervised token."))
        (folder / "loss.png").write_bytes(loss.light)
    (folder / "predicted_vs_true.png").write_bytes(predicted_against_true(true, counts).light)
    (folder / "error_by_crowd_size.png").write_bytes(crowd.light)
    groups = items_to_look_at(questions, facts, answers, counts, errors)

    # Page and files
    write_report(
        folder / "report.html",
        title=f"{run.name}: counting people",
        outcome=verdict[0].outcome,
        sentences=sentences,
        facts={
            "Base model": base,
            "Questions": f"{len(true):,} about {len(set(images)):,} pictures of {settings['dataset']}, split {settings['split']}"
            + (f"; {num_others:,} other rows are not counting questions" if num_others else ""),
            "Answers": f"greedy, at most {settings['max_new_tokens']} tokens, the same prompts for both models",
        },
        tables=tables,
        figures=plots,
        item_groups=groups,
    )
    shutil.copyfile(folder / "report.html", run / "report.html")
    lines = [
        {key: facts[key][index] for key in ("row", "image_id", "question", "reference")}
        | {"truth": true[index]}
        | {model: answers[model][index] for model in counts}
        | {f"{model}_count": counts[model][index] for model in counts}
        for index in range(len(true))
    ]
    metrics = {
        "settings": settings,
        "base_model": base,
        "not_counting_questions": num_others,
        "scores": scores,
        "by_crowd_size": by_size,
        "verdict": [difference.as_dict() for difference in verdict],
    }
    markdown = "\n\n".join([*sentences, *(f"**{table.title}**\n\n{table.as_markdown()}" for table in tables)])
    finish_evaluation(folder, metrics, lines, markdown)
    numbers = {
        f"{model}_{key}": scores[model][key] for model in counts for key in ("penalised_mae", "exact", "within_1")
    }
    log_to_wandb(run, settings["split"], numbers, tables, plots, [item for group in groups.values() for item in group])


def score_table(scores: dict[str, dict], labels: dict[str, str]) -> Table:
    def number(value: float | None, sign: str = "") -> str:
        return "none" if value is None else f"{value:{sign}.2f}"

    return Table(
        "Counting scores",
        ["", "MAE", "MAE, penalised", "RMSE", "bias", "exact", "within 1", "within 2", "unparsable"],
        [
            [
                labels[model],
                number(part["mae"]),
                number(part["penalised_mae"]),
                number(part["rmse"]),
                number(part["bias"], "+"),
                *(f"{part[key]:.1%}" for key in ("exact", "within_1", "within_2", "unparsable_rate")),
            ]
            for model, part in scores.items()
        ],
        "In people. MAE, RMSE and bias (answer minus truth) are over the answers that state a count; in the penalised MAE "
        "an answer that states none costs as much as answering 0, and in the shares it is wrong.",
    )


def crowd_table(by_size: dict[str, list[dict]], labels: dict[str, str]) -> Table:
    parts = next(iter(by_size.values()))
    return Table(
        "Penalised MAE by crowd size",
        ["people, true", "questions", *(labels[model] for model in by_size)],
        [
            [
                f"{part['from']} to {part['to']}" if part["from"] < part["to"] else str(part["from"]),
                str(part["n"]),
                *(f"{by_size[model][index]['penalised_mae']:.2f}" for model in by_size),
            ]
            for index, part in enumerate(parts)
        ],
    )


def items_to_look_at(
    questions: Dataset,
    facts: dict[str, list],
    answers: dict[str, list[str]],
    counts: dict[str, list[int | None]],
    errors: dict[str, list[int]],
) -> dict[str, list[Item]]:
    """The worst, median and best items by the tuned model's error, each picture once; of equals the most changed first."""

    def item(index: int) -> Item:
        def remark(model: str) -> str:
            count = counts[model][index]
            off = "right" if count == facts["count"][index] else f"off by {errors[model][index]}"
            return "states no count" if count is None else f"read as {count}, {off}"

        image = questions[index]["images"]
        return Item(
            name=str(facts["image_id"][index]),
            question=facts["question"][index],
            truth=str(facts["count"][index]),
            base=answers["base"][index],
            tuned=answers["tuned"][index],
            base_remark=remark("base"),
            tuned_remark=remark("tuned"),
            image=open_picture(image[0]) if image else None,
        )

    ranked = sorted(range(len(questions)), key=lambda index: (-errors["tuned"][index], errors["base"][index]))
    seen: set[str] = set()
    ranked = [i for i in ranked if not (facts["image_id"][i] in seen or seen.add(facts["image_id"][i]))]
    number = min(SHOWN, max(1, len(ranked) // 3))
    middle = (len(ranked) - number) // 2
    picks = {
        "Worst answers": ranked[:number],
        "Middling answers": ranked[middle : middle + number],
        "Best answers": ranked[: -number - 1 : -1],
    }
    return {heading: [item(index) for index in indices] for heading, indices in picks.items()}


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="folder of a finished training, such as outputs/llava-sample")
    parser.add_argument("--dataset", help="folder or Hub dataset; left out: the one that the run was trained on")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch_size", type=positive, default=8, help="questions asked at once, on each process")
    parser.add_argument("--max_new_tokens", type=positive, default=32, help="longest answer, in tokens")
    parser.add_argument("--limit", type=positive, help="ask only so many questions, evenly spaced over the split")
    parser.add_argument("--overwrite", action="store_true", help="evaluate anew; the old evaluation is kept beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The answers so far are kept: the same command continues.")
