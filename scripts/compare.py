"""Which of two runs answers better? Compares their evaluations of the same questions, pair by pair, on one page.

    python scripts/compare.py outputs/llava-lora outputs/llava-qlora
    python scripts/compare.py outputs/a outputs/b --dataset data/other --split test --language ko

Both runs must have been evaluated on that split (scripts/evaluate_llava.py, evaluate_gemma.py); no model is asked again.
The page goes to <first run>-against-<second run>.html beside the first run's folder, or to --output.
"""

import argparse
from pathlib import Path

from finetuning import command
from finetuning.data.dataset import load_wording, open_dataset, open_split
from finetuning.evaluation.answering import digest, read_answers
from finetuning.evaluation.page import Findings
from finetuning.evaluation.report import write_report
from finetuning.evaluation.verdict import describe, details, headline
from finetuning.families import is_vision
from finetuning.flags import Parser
from finetuning.models.processing import load_config
from finetuning.pages import LANGUAGES, Say, speak
from finetuning.run_folder import EvaluationFolder, find_again, open_run, untuned_model
from finetuning.tasks import anime_facts
from finetuning.tasks.evaluate import digest_questions, evaluation_folder, find, train_rows_of
from finetuning.tasks.exam import TASKS, make_exam


def main(args: argparse.Namespace) -> Path:
    """Compare two evaluated runs on the questions that both answered, and write the page; its path is returned."""
    say = speak(args.language)
    runs = [open_run(name) for name in args.runs]
    first, arguments = runs[0]
    name = args.dataset or arguments["dataset_name"]
    source = args.dataset or find_again(first, name)
    wording = load_wording(source) if args.task is None else None

    # Evaluations that are there, of the same questions
    folders = [
        EvaluationFolder(run, "facts") if wording else evaluation_folder(run, of_run, name, args.split)[0]
        for run, of_run in runs
    ]
    settings = same_settings(folders)
    answers = {model: read_answers(folder)["tuned"] for model, folder in zip(("base", "tuned"), folders, strict=True)}
    labels = {model: run.name for model, (run, _) in zip(("base", "tuned"), runs, strict=True)}
    if labels["base"] == labels["tuned"]:
        labels = {model: str(run) for model, (run, _) in zip(labels, runs, strict=True)}

    # The same questions, scored for both
    dataset = open_dataset(source, vision=is_vision(load_config(untuned_model(first))))
    if wording:
        exam = anime_facts.TitlesExam(dataset, wording, name, settings["limit"])
        asked = digest([[question["question"], question["reference"]] for question in exam.questions])
        findings = exam.find(answers, None, name, labels, say)
    else:
        rows = open_split(dataset, args.split, name)
        train = train_rows_of(first, arguments, dataset, name, vision="images" in rows.column_names)
        exam = make_exam(rows, train, task=args.task, limit=settings["limit"])
        asked = digest_questions(exam)
        findings = find(exam, answers, settings, labels, say)
    if asked != settings["questions_sha256"]:
        raise ValueError(f"{name}: its rows are not those that were asked: evaluate both runs anew, with --overwrite")
    output = args.output or first.parent / f"{first.name}-against-{runs[1][0].name}.html"
    write_page(output, findings, labels, settings, args.language, say)
    return output


def same_settings(folders: list[EvaluationFolder]) -> dict:
    """The settings of both evaluations. Raises ValueError where one is missing, or they asked something else."""
    missing = [folder.folder for folder in folders if not folder.metrics()]
    if missing:
        raise ValueError(
            f"no finished evaluation in {', '.join(map(str, missing))}: evaluate both runs on this dataset and split first"
        )
    first, second = (folder.metrics()["settings"] for folder in folders)
    differing = [key for key in ("questions_sha256", "max_new_tokens", "limit") if first[key] != second[key]]
    if differing:
        raise ValueError(
            f"the evaluations differ in {', '.join(differing)}: evaluate both runs with the same flags and data (--overwrite)"
        )
    return first


def write_page(
    output: Path, findings: Findings, labels: dict[str, str], settings: dict, language: str, say: Say
) -> None:
    """The comparison as one HTML page at `output`, in `language`."""
    sentences = [describe(verdict, say) for verdict in findings.verdicts]
    write_report(
        output,
        title=say(f"{labels['tuned']} against {labels['base']}", f"{labels['base']}와(과) 견준 {labels['tuned']}"),
        outcome=findings.verdicts[0].outcome,
        sentences=[(headline(verdict, say), details(verdict, say)) for verdict in findings.verdicts],
        facts={
            say("From, to", "비교 순서"): f"{labels['base']} → {labels['tuned']}",
            say("Questions", "질문"): findings.asked,
            say("Answers", "답"): say(
                f"greedy, at most {settings['max_new_tokens']} tokens", f"greedy, 최대 {settings['max_new_tokens']}토큰"
            ),
        },
        tables=findings.tables,
        figures=findings.plots,
        item_groups=findings.item_groups,
        language=language,
        labels=labels,
    )
    print("\n\n".join([*sentences, *(f"**{table.title}**\n\n{table.as_markdown()}" for table in findings.tables)]))
    print(f"Page: {output}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `argv` is sys.argv's where it is None."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="folders of two finished and evaluated runs")
    parser.add_argument("--dataset", help="left out: the one that the first run was trained on")
    parser.add_argument("--split", default="test", help="default %(default)s")
    parser.add_argument("--task", choices=sorted(TASKS), help="what the rows are; left out: as in training")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="default %(default)s")
    parser.add_argument("--output", type=Path, help="HTML file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()))
