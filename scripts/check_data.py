"""Check every row of a dataset as the model will see it, on a CPU, before a GPU is paid for.

    python scripts/check_data.py
    python scripts/check_data.py --config scripts/configs/gemma_qlora.yaml --preview 20

Takes the recipe and the flags of the training that it is for (--config, --dataset_name, --model_name_or_path, ...), and
runs the same processor, template and collator over all rows on all cores; of the model it reads only the configuration,
no weights. Pictures in which there is nothing to see, and pictures that look the same and are labelled differently, are
faults too. Every fault has a reason code and a row. It also says how answers will be scored, and which rows cannot be. Exit
status 1 when there is a fault or nothing that is asked can be scored, 0 when the data is clean. What was
found is kept in outputs/data-check/<dataset>/check.json; with --preview N a page beside it shows N rows (faulty ones
first) with their pictures as preprocessed and their tokens, the supervised ones marked.
"""

from finetuning import command  # first: see there

# isort: split
import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.command_line import read_command
from finetuning.failures import harmless
from finetuning.flags import Parser, positive
from finetuning.folder_lock import one_at_a_time
from finetuning.model_files import config_of, refuse_missing_dataset
from finetuning.run_folder import write_atomically, write_json

if TYPE_CHECKING:
    from datasets import Dataset

    from finetuning.data.label_audit import Auditor, RowAudit

RECIPE = Path(__file__).parent / "configs" / "llava_qlora.yaml"
BATCH_SIZE = 16


def audit_batch(auditor: "Auditor", rows: "Dataset", indices: list[int]) -> "list[RowAudit]":
    """Audit the rows at `indices`, for a pool of processes."""
    from finetuning.data.label_audit import undecoded

    return auditor(undecoded(rows, indices))


def audit_rows(auditor: "Auditor", rows: "Dataset", num_processes: int) -> "list[RowAudit]":
    """All rows through the auditor, on `num_processes` processes; in the order of the rows."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from finetuning.data.bad_rows import lost_reader_named

    audits: list[RowAudit] = []
    batches = DataLoader(
        range(len(rows)),
        batch_size=BATCH_SIZE,
        collate_fn=functools.partial(audit_batch, auditor, rows),
        num_workers=num_processes,
    )
    with (
        tqdm(total=len(rows), desc=f"Checking {auditor.split}", unit="row") as bar,
        lost_reader_named(rows, lambda: range(len(audits), len(audits) + 2 * num_processes * BATCH_SIZE)),
    ):
        for batch in batches:
            audits += batch
            bar.update(len(batch))
    return audits


def rows_to_show(audits: "Sequence[RowAudit]", number: int) -> "list[RowAudit]":
    """At most `number`: faulty rows on up to half of the page, each kind once before any twice; then good ones, spread."""
    turns: list[tuple[int, Any]] = []
    seen: dict[tuple[str, ...], int] = {}
    for audit in audits:
        if audit.faults:
            kind = tuple(code for code, _ in audit.faults)
            turns.append((seen.setdefault(kind, 0), audit))
            seen[kind] += 1
    faulty = [audit for _, audit in sorted(turns, key=lambda turn: turn[0])][: (number + 1) // 2]
    good = [audit for audit in audits if not audit.faults]
    wanted = min(number - len(faulty), len(good))
    return faulty + [good[place * len(good) // wanted] for place in range(wanted)]


def main(recipe: argparse.Namespace, options: argparse.Namespace) -> "list[RowAudit]":
    """Audits the dataset, prints and keeps what was found, and returns the audit of each row."""
    # PyTorch comes with these, once there are a dataset and a model to look at. The Trainer does not.
    config = config_of(recipe.model_name_or_path)
    refuse_missing_dataset(recipe.dataset_name, vision=config is None or "vision_config" in config)
    from finetuning.data.dataset import open_dataset, open_split, spread
    from finetuning.data.label_audit import Auditor, describe_faults, labels_of, report_differing_labels, undecoded
    from finetuning.data.label_preview import LENGTH_COLUMNS, length_table
    from finetuning.data.pictures import open_picture
    from finetuning.families import is_vision
    from finetuning.models.processing import follow_tiles, load_config, processing_class_of

    # What training would load, without weights
    config = load_config(recipe.model_name_or_path, recipe.model_revision)
    vision = is_vision(config)
    processing_class = processing_class_of(recipe)
    if recipe.image_max_tiles is not None:
        follow_tiles(config, processing_class)
    dataset = open_dataset(recipe.dataset_name, vision=vision)
    columns = ["messages", "images", "row"] if vision else ["messages", "row"]
    splits = {name: open_split(dataset, name, recipe.dataset_name) for name in dataset if dataset[name]}

    # Which rows can be scored
    scoring = check_scoring(recipe, splits)

    # Every row, or a sample, each on its own; then what they say of pictures that look the same
    audits: list[RowAudit] = []
    labels: list[dict[str, str]] = []
    for name, rows in splits.items():
        rows = rows if options.sample is None else spread(rows, options.sample)
        auditor = Auditor(processing_class, config, recipe.max_length, name)
        audits += audit_rows(auditor, rows.select_columns(columns), options.processes)
        labels += labels_of(rows) if vision else []
    if vision:
        report_differing_labels(
            audits, labels, lambda audit: open_picture(undecoded(splits[audit.split], [audit.row])[0]["images"][0])
        )

    # What was found
    faulty = [audit for audit in audits if audit.faults]
    folder = options.output or Path("outputs/data-check") / Path(recipe.dataset_name).name
    folder.mkdir(parents=True, exist_ok=True)
    table = [LENGTH_COLUMNS, *length_table(audits)]
    print("\n".join("".join(f"{cell:>12}" for cell in line) for line in table) + "   (lengths in tokens)")
    faults = [
        {"split": audit.split, "row": audit.row, "reason": reason, "detail": detail}
        for audit in faulty
        for reason, detail in audit.faults
    ]
    found = {
        "dataset": recipe.dataset_name,
        "model": recipe.model_name_or_path,
        "rows": len(audits),
        "sample": options.sample,
        "faulty_rows": len(faulty),
        "faults": faults,
        "scoring": scoring,
    }
    with one_at_a_time(folder / "check.json", "a data check"):
        write_json(folder / "check.json", found)
    print(f"Report: {folder / 'check.json'}")
    if options.preview:
        title = f"{recipe.dataset_name}, as {recipe.model_name_or_path} sees it"
        write_preview(folder / "preview.html", title, audits, splits, options.preview, processing_class)
        print(f"Preview: {folder / 'preview.html'}")
    if problem := scoring.get("problem"):
        raise ValueError("\n".join([problem, *([describe_faults(audits)] if faulty else [])]))
    return audits


def write_preview(
    path: Path, title: str, audits: "list[RowAudit]", splits: "dict[str, Dataset]", number: int, processing_class: Any
) -> None:
    """The page with `number` rows, faulty ones first."""
    from finetuning.data.label_audit import undecoded
    from finetuning.data.label_preview import preview_page

    shown = []
    for audit in rows_to_show(audits, number):
        row = undecoded(splits[audit.split], [audit.row])[0]
        row["images"] = row.get("images") or []
        shown.append((audit, row))
    page = preview_page(title, audits, shown, processing_class)
    with one_at_a_time(path, "a data check"):
        write_atomically(path, page)


def check_scoring(recipe: argparse.Namespace, splits: "dict[str, Dataset]") -> dict[str, Any]:
    """Says how many rows of each split can be scored, and why others cannot; `problem` where none can that is asked.

    What is asked while training is the validation split, if there is one: none of its rows scorable is an error, unless
    no answers are wanted (`eval_answers: 0`).
    """
    from finetuning.data.dataset import load_wording
    from finetuning.tasks.exam import reasons, scoring_of

    if load_wording(recipe.dataset_name) is not None and recipe.task is None:
        print("Scoring: facts about titles, read back by the wording in manifest.json")
        return {"task": "anime_facts"}
    evidence, found = scoring_of(splits, recipe.dataset_train_split, recipe.task)
    print(f"Scoring: {evidence}")
    for name, (number, refused) in found.items():
        print(f"  {name}: {number:,} of {number + len(refused):,} rows can be scored")
        if refused:
            print(f"    {reasons(refused)}")
    scoring: dict[str, Any] = {
        "evidence": evidence,
        "splits": {
            name: {"scored": number, "refused": [{"row": row, "reason": reason} for row, reason in refused]}
            for name, (number, refused) in found.items()
        },
    }
    asked = found.get(recipe.dataset_validation_split)
    if asked is not None and not asked[0] and recipe.eval_answers:
        scoring["problem"] = (
            f"not one row of split {recipe.dataset_validation_split} can be scored ({evidence}): {reasons(asked[1])}. "
            "Correct the rows, name their task (--task, or a column task), or train without asking: --eval_answers 0"
        )
    return scoring


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the words left over for the recipe."""
    parser = Parser(__doc__)
    parser.add_argument("--preview", type=int, default=0, metavar="N", help="write an HTML page with N rows")
    parser.add_argument(
        "--sample", type=positive, metavar="N", help="check N rows of each split, evenly spaced, not all of them"
    )
    parser.add_argument("--output", type=Path, help="folder of the report (outputs/data-check/<dataset>)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=positive, default=cores, help="processes to check on (all cores)")
    return parser.parse_known_args(argv)


def check(argv: list[str]) -> None:
    """The whole command: `main`, and what its audits mean. Raises ValueError where a row has a fault."""
    options, recipe_flags = parse_options(argv)
    recipe = read_command(RECIPE, recipe_flags)[1]
    audits = main(recipe, options)
    if num_faulty := sum(bool(audit.faults) for audit in audits):
        from finetuning.data.label_audit import describe_faults

        raise ValueError(
            f"{recipe.dataset_name}: {num_faulty:,} of {len(audits):,} rows have faults:\n{harmless(describe_faults(audits))}"
        )
    checked = f"All {len(audits):,} rows" if options.sample is None else f"{len(audits):,} rows, a sample,"
    print(f"{checked} are good: every picture, prompt and answer is what the model will be asked with.")


if __name__ == "__main__":
    command.run(lambda: check(sys.argv[1:]))
