"""Answers of a run and of its base to the same questions: asked once, kept as they come, continued after a stop."""

import gc
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning import tracking
from finetuning.evaluation.report import Item, Plot, Table
from finetuning.inference.generation import generate_answers
from finetuning.models.loading import load_for_inference
from finetuning.run_folder import changed_settings, set_aside

CHUNK = 16  # batches answered between two writes to disk
UNFINISHED = "answers.unfinished.jsonl"


def ask_both(
    run: Path,
    base: str,
    ask: Callable[[str, PreTrainedModel | PeftModel, ProcessorMixin | PreTrainedTokenizerBase], None],
    names: Sequence[str] = ("tuned", "base"),
) -> None:
    """`ask(name, model, processing_class)` of the run's model and of its base, with the run's own processor.

    An adapter is switched off for the base. Where every weight was trained the base is another model, and only one of
    the two is in memory at a time.
    """
    model, processing_class = load_for_inference(str(run))
    for name in names:
        off = nullcontext()
        if name == "base" and isinstance(model, PeftModel):
            off = model.disable_adapter()
        elif name == "base":
            del model
            gc.collect()
            torch.cuda.empty_cache()
            model, _ = load_for_inference(base)
        with off:
            ask(name, model, processing_class)


def digest(values: Any) -> str:
    """SHA-256 of values as JSON: tells whether two evaluations asked the same."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def start_evaluation(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Make the folder of an evaluation, or find it; True when it is finished already, with the same settings.

    With `overwrite` what is there is kept under another name. ValueError when it was made with other settings.
    """
    state = PartialState()
    files = [folder / "metrics.json", folder / UNFINISHED]
    found = next((path for path in files if path.is_file()), None)
    if found is not None and not overwrite:
        text = found.read_text(encoding="utf-8")
        before = json.loads(text if found.suffix == ".json" else text.partition("\n")[0])["settings"]
        if changed := changed_settings(before, settings):
            raise ValueError(
                f"{folder}: an evaluation with other settings is here ({'; '.join(changed)}). Run it with the old "
                "ones to see it, or with --overwrite to make a new one (the old one is kept under another name)"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        if overwrite and folder.exists():
            print(f"The evaluation before is kept as {set_aside(folder)}")
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite or found is None:
            _append(folder / UNFINISHED, [{"settings": settings}])
    state.wait_for_everyone()
    return not overwrite and found is not None and found.name == "metrics.json"


def answer_with_both(
    run: Path, base: str, rows: Dataset, folder: Path, *, batch_size: int, max_new_tokens: int
) -> dict[str, list[str]]:
    """Greedy answers of the `base` and the `tuned` model, one per row, in order, on every process.

    `rows` have `messages` that end with a user turn (and `images`). Both models get the same prompts, made by the run's
    own processor. Answers are kept in `folder` as they come; those of an evaluation that was stopped are not asked again.
    """
    state = PartialState()
    answers = _read_unfinished(folder / UNFINISHED)
    missing = [name for name in ("tuned", "base") if len(answers[name]) < len(rows)]
    if not missing:
        return answers

    def ask(
        name: str, model: PreTrainedModel | PeftModel, processing_class: ProcessorMixin | PreTrainedTokenizerBase
    ) -> None:
        done = answers[name]
        bar = tqdm(
            total=len(rows),
            initial=len(done),
            desc=f"Asking the {name} model",
            unit="answer",
            disable=not state.is_main_process,
        )
        with bar:
            # The size of a chunk does not depend on the number of processes: the same batches, the same answers.
            while len(done) < len(rows):
                chunk = range(len(done), min(len(done) + CHUNK * batch_size, len(rows)))
                new = generate_answers(
                    model,
                    processing_class,
                    rows.select(chunk),
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    description=f"{name} model, answers {chunk.start + 1} to {chunk.stop}",
                )
                if state.is_main_process:
                    _append(folder / UNFINISHED, [{name: answer} for answer in new])
                done += new
                bar.update(len(new))

    ask_both(run, base, ask, missing)
    return answers


def _read_unfinished(path: Path) -> dict[str, list[str]]:
    answers: dict[str, list[str]] = {"base": [], "tuned": []}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        for name, answer in json.loads(line).items():
            answers[name].append(answer)
    return answers


def _append(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add JSON lines; the whole file is replaced at once, so that a kill never leaves half a line."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    new = path.with_name(path.name + ".new")
    new.write_text(before + lines, encoding="utf-8")
    new.rename(path)


def finish_evaluation(folder: Path, metrics: dict[str, Any], answers: Sequence[dict[str, Any]], tables: str) -> None:
    """Write answers.jsonl, table.md and, last, metrics.json, which says that the evaluation is whole."""
    (folder / "answers.jsonl").unlink(missing_ok=True)
    _append(folder / "answers.jsonl", answers)
    (folder / "table.md").write_text(tables, encoding="utf-8")
    unfinished = folder / "metrics.json.unfinished"
    unfinished.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.rename(folder / "metrics.json")
    (folder / UNFINISHED).unlink(missing_ok=True)


def log_to_wandb(
    run: Path,
    split: str,
    numbers: dict[str, float],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    items: Sequence[Item],
) -> None:
    """The evaluation in the W&B run of the training: numbers, tables, plots, items with pictures. Nothing without W&B."""
    if "wandb" not in tracking.set_up(str(run), run.name):
        return
    import wandb

    logged: dict[str, Any] = {f"{split}/{name}": value for name, value in numbers.items()}
    for table in tables:
        logged[f"{split}/{table.title}"] = wandb.Table(
            columns=list(table.columns), data=[list(row) for row in table.rows]
        )
    for plot in plots:
        with_bytes = Image.open(io.BytesIO(plot.picture.light))
        logged[f"{split}/{plot.title}"] = wandb.Image(with_bytes, caption=plot.caption)
    columns = ["item", "image", "question", "truth", "base", "tuned"]
    rows = [
        [item.name, item.image and wandb.Image(item.image), item.question, item.truth, item.base, item.tuned]
        for item in items
    ]
    logged[f"{split}/answers"] = wandb.Table(columns=columns, data=rows)
    wandb.log(logged)
    wandb.finish()
