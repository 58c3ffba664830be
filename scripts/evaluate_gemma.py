"""What does a run know of the titles it was taught, and of titles it never saw? Asks the base and the tuned model.

    python scripts/evaluate_gemma.py --run outputs/gemma-sample
    accelerate launch scripts/evaluate_gemma.py --run outputs/gemma-qlora --dataset data/anime --batch_size 32

Taught titles (split `test`) are asked in words that training never used: right answers are memory. Titles never taught
(split `validation`) cannot be known: what is right there is a guess, and tells how much of the rest is guessing, too.
Writes outputs/<run>/evaluation/facts/ (metrics.json, answers.jsonl, table.md, pictures) and outputs/<run>/report.html.
Stopped half way, the same command continues; finished, it shows what is there.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.data.dataset import open_dataset, open_split, spread
from finetuning.evaluation.answering import (
    answer_with_both,
    ask_both,
    digest,
    finish_evaluation,
    log_to_wandb,
    start_evaluation,
)
from finetuning.evaluation.bootstrap import compare, describe
from finetuning.evaluation.perplexity import AnswerLoss, answer_losses, perplexity
from finetuning.evaluation.plots import Picture, draw, loss_curves
from finetuning.evaluation.report import Item, Plot, Table, write_report
from finetuning.run_folder import digest_weights, find_again, open_run, read_log_history, untuned_model
from finetuning.tasks.anime_facts import (
    LISTS,
    FactReader,
    guess_most_common,
    load_wording,
    score_facts,
    share_right,
    summarise,
)

SPLITS = {"test": "taught titles", "validation": "titles never taught"}
MODELS = ("base", "tuned")
SHOWN = 6  # items in each group of the report
Scores = dict[str, float | None]


def main(args: argparse.Namespace) -> None:
    # Questions: rows of both splits, cut before the answer
    run, arguments = open_run(args.run)
    name = args.dataset or arguments["dataset_name"]
    source = args.dataset or find_again(run, name)
    wording = load_wording(source)
    if wording is None:
        raise ValueError(f"{name}: no manifest.json with the wording of answers. prepare_anime.py writes one")
    dataset = open_dataset(source, vision=False)
    train = open_split(dataset, "train", name)
    reader = FactReader(wording, train)
    questions: list[dict[str, Any]] = []
    for split in SPLITS:
        rows = open_split(dataset, split, name)
        rows = rows if args.limit is None else spread(rows, args.limit)
        questions += [question | {"split": split} for question in reader.questions(rows)]
    settings = {
        "dataset": name,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "questions_sha256": digest([[question["question"], question["reference"]] for question in questions]),
        "weights_sha256": digest_weights(run),
    }
    folder = run / "evaluation" / "facts"
    state = PartialState()
    if not start_evaluation(folder, settings, overwrite=args.overwrite):
        # Answers and losses, of both models on the same prompts
        base = untuned_model(run)
        prompts = Dataset.from_list([{"messages": question["messages"]} for question in questions])
        answers = answer_with_both(
            run, base, prompts, folder, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
        )
        losses = losses_of_both(run, base, questions, batch_size=args.batch_size)
        if state.is_main_process:
            write_evaluation(run, folder, base, reader, guess_most_common(train), questions, answers, losses, settings)
    elif state.is_main_process:
        print("This evaluation is finished already, and shown here; --overwrite makes it anew.")
    if state.is_main_process:
        print("\n" + (folder / "table.md").read_text(encoding="utf-8"))
        print(f"Page:     {run / 'report.html'}\nPictures: {folder}/*.png\nAnswers:  {folder / 'answers.jsonl'}")
    state.destroy_process_group()


def losses_of_both(
    run: Path, base: str, questions: Sequence[dict[str, Any]], *, batch_size: int
) -> dict[str, list[AnswerLoss]]:
    """The loss of the reference answers, under the tuned and the base model."""
    conversations = [
        [*question["messages"], {"role": "assistant", "content": question["reference"]}] for question in questions
    ]
    losses = {}

    def ask(name: str, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        losses[name] = answer_losses(
            model, tokenizer, conversations, batch_size=batch_size, description=f"Loss of the {name} model"
        )

    ask_both(run, base, ask)
    return losses


def write_evaluation(
    run: Path,
    folder: Path,
    base: str,
    reader: FactReader,
    guess: dict[str, Any],
    questions: Sequence[dict[str, Any]],
    answers: dict[str, list[str]],
    losses: dict[str, list[AnswerLoss]],
    settings: dict[str, Any],
) -> None:
    """Scores, verdict, tables, pictures, page."""
    scored: dict[str, list[Scores]] = {
        model: [
            score_facts(reader.read(question["kind"], answer), question["facts"])
            for question, answer in zip(questions, answers[model], strict=True)
        ]
        for model in MODELS
    }
    scored["guess"] = [score_facts(guess, question["facts"]) for question in questions]
    indices = {split: [i for i, question in enumerate(questions) if question["split"] == split] for split in SPLITS}
    summaries: dict[str, dict[str, Any]] = {}
    for split, chosen in indices.items():
        summaries[split] = {model: summarise([scores[i] for i in chosen]) for model, scores in scored.items()}
        for model in MODELS:
            summaries[split][model]["perplexity"] = perplexity([losses[model][i] for i in chosen])

    # Verdict
    verdict = []
    for split, chosen in indices.items():
        known = [i for i in chosen if scored["tuned"][i]]
        titles = [questions[i]["title"] for i in known]
        shares = {model: [100 * share_right(scored[model][i]) for i in known] for model in MODELS}
        measure = f"facts right about {SPLITS[split]}"
        verdict.append(
            compare(
                measure, shares["base"], shares["tuned"], titles, lower_is_better=False, unit="%", grouped_by="titles"
            )
        )
    for split, chosen in indices.items():
        per_token = {model: [losses[model][i].total / losses[model][i].num_tokens for i in chosen] for model in MODELS}
        titles = [questions[i]["title"] for i in chosen]
        measure = f"loss per token of answers about {SPLITS[split]}"
        verdict.append(
            compare(measure, per_token["base"], per_token["tuned"], titles, lower_is_better=True, grouped_by="titles")
        )
    sentences = [describe(difference) for difference in verdict]

    # Tables and pictures
    tables = [fact_table(SPLITS[split], summaries[split]) for split in SPLITS]
    plots = [
        Plot(
            f"Facts right: {SPLITS[split]}",
            right_by_field(summaries[split]),
            "F1 for genres, share exactly right for the rest. The guess is the commonest value of each field.",
        )
        for split in SPLITS
    ]
    loss = loss_curves(read_log_history(run))
    if loss is not None:
        plots.append(Plot("Loss while training", loss, "Per supervised token; validation titles are never taught."))
    for plot, file_name in zip(plots, ("facts_taught.png", "facts_never_taught.png", "loss.png"), strict=False):
        (folder / file_name).write_bytes(plot.picture.light)
    groups = items_to_look_at(questions, answers, scored, indices)

    # Page and files
    num_titles = {split: len({questions[i]["title"] for i in chosen}) for split, chosen in indices.items()}
    write_report(
        folder / "report.html",
        title=f"{run.name}: facts about titles",
        outcome=verdict[0].outcome,
        sentences=sentences,
        facts={
            "Base model": base,
            "Questions": ", ".join(
                f"{len(indices[split]):,} about {num_titles[split]:,} {what}" for split, what in SPLITS.items()
            )
            + f", from {settings['dataset']}",
            "Answers": f"greedy, at most {settings['max_new_tokens']} tokens, the same prompts for both models",
        },
        tables=tables,
        figures=plots,
        item_groups=groups,
    )
    shutil.copyfile(folder / "report.html", run / "report.html")
    lines = [
        {key: question[key] for key in ("split", "anime_id", "title", "kind", "question", "reference")}
        | {model: answers[model][i] for model in MODELS}
        | {f"{model}_scores": scored[model][i] for model in MODELS}
        for i, question in enumerate(questions)
    ]
    metrics = {
        "settings": settings,
        "base_model": base,
        "scores": summaries,
        "verdict": [difference.as_dict() for difference in verdict],
    }
    markdown = "\n\n".join([*sentences, *(f"**{table.title}**\n\n{table.as_markdown()}" for table in tables)])
    finish_evaluation(folder, metrics, lines, markdown)
    numbers = {
        f"{split}_{model}_{key}": summaries[split][model][key]
        for split in SPLITS
        for model in MODELS
        for key in ("right", "perplexity")
    }
    log_to_wandb(run, "facts", numbers, tables, plots, [item for group in groups.values() for item in group])


def fact_table(what: str, summaries: dict[str, dict[str, Any]]) -> Table:
    def share(value: float | None) -> str:
        return "none" if value is None else f"{value:.1%}"

    def number(value: float | None) -> str:
        return "none" if value is None or math.isinf(value) else f"{value:,.2f}"

    labels = {"base": "base", "tuned": "tuned", "guess": "commonest value"}
    return Table(
        f"Facts: {what}",
        [
            "",
            "right",
            "genres F1",
            "producers",
            "studios",
            "episodes",
            "rating",
            "score off by",
            "score stated",
            "perplexity",
        ],
        [
            [
                labels[model],
                share(part["right"]),
                *(
                    share(part[f"{field}_f1" if field == "genres" else f"{field}_exact"])
                    for field in (*LISTS, "episodes", "rating")
                ),
                number(part["score_error"]),
                share(part["score_stated"]),
                number(part.get("perplexity")),
            ]
            for model, part in summaries.items()
        ],
        "Right: mean over the facts that an answer should state, the score right within 0.1. Producers and studios are "
        "right when all are named and no other. Perplexity is that of the true answers.",
    )


def right_by_field(summaries: dict[str, dict[str, Any]]) -> Picture:
    """Bars for each field: base, tuned, and the commonest value."""
    fields = [*LISTS, "episodes", "rating"]

    def plot(figure, colours) -> None:
        axes = figure.subplots()
        for number, (model, label) in enumerate((("base", "base"), ("tuned", "tuned"), ("guess", "commonest value"))):
            shares = [summaries[model][f"{field}_f1" if field == "genres" else f"{field}_exact"] for field in fields]
            places = [place + (number - 1) * 0.27 for place in range(len(fields))]
            colour = colours["reference" if model == "guess" else model]
            axes.bar(places, [100 * (value or 0) for value in shares], 0.25, color=colour, label=label)
        axes.set_xticks(range(len(fields)), fields)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 118)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("right, %")
        axes.legend(loc="upper center", ncols=3)

    return draw(plot)


def items_to_look_at(
    questions: Sequence[dict[str, Any]],
    answers: dict[str, list[str]],
    scored: dict[str, list[Scores]],
    indices: dict[str, list[int]],
) -> dict[str, list[Item]]:
    """The best, middling and worst answers about taught titles, and some about titles never taught; a title once."""

    def remark(scores: Scores) -> str:
        return ", ".join(
            f"{field}: {'not stated' if value is None else f'off by {value:.2f}' if field == 'score' else f'{value:.0%}'}"
            for field, value in scores.items()
        )

    def item(i: int) -> Item:
        return Item(
            name=questions[i]["title"],
            question=questions[i]["question"],
            truth=questions[i]["reference"],
            base=answers["base"][i],
            tuned=answers["tuned"][i],
            base_remark=remark(scored["base"][i]),
            tuned_remark=remark(scored["tuned"][i]),
        )

    def ranked(split: str) -> list[int]:
        known = [i for i in indices[split] if scored["tuned"][i]]
        known.sort(key=lambda i: (-share_right(scored["tuned"][i]), share_right(scored["base"][i])))
        seen: set[str] = set()
        return [i for i in known if not (questions[i]["title"] in seen or seen.add(questions[i]["title"]))]

    taught, unseen = ranked("test"), ranked("validation")
    number = min(SHOWN, max(1, len(taught) // 3))
    middle = (len(taught) - number) // 2
    picks = {
        "Taught titles: best answers": taught[:number],
        "Taught titles: middling answers": taught[middle : middle + number],
        "Taught titles: worst answers": taught[: -number - 1 : -1],
        "Titles never taught: from best to worst": unseen[:: max(1, len(unseen) // SHOWN)][:SHOWN],
    }
    return {heading: [item(i) for i in chosen] for heading, chosen in picks.items()}


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="folder of a finished training, such as outputs/gemma-sample")
    parser.add_argument(
        "--dataset", help="folder that prepare_anime.py wrote; left out: the one the run was trained on"
    )
    parser.add_argument("--batch_size", type=positive, default=16, help="questions asked at once, on each process")
    parser.add_argument("--max_new_tokens", type=positive, default=128, help="longest answer, in tokens")
    parser.add_argument("--limit", type=positive, help="ask only so many questions of each split, evenly spaced")
    parser.add_argument("--overwrite", action="store_true", help="evaluate anew; the old evaluation is kept beside it")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
