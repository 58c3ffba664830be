"""Answers of a run and of its base to the same questions: asked once, kept as they come, continued after a stop."""

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.folder_lock import refuse_together, take_lock
from finetuning.inference.generation import answer_rows
from finetuning.manifest import has_manifest, manifest_problems
from finetuning.models.loading import load_for_inference
from finetuning.run_folder import EvaluationFolder, changed_settings, set_aside

MODELS = ("base", "tuned")


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
            model, _ = load_for_inference(base, asked_by=processing_class)
        with off:
            ask(name, model, processing_class)


def digest(values: Any) -> str:
    """SHA-256 of values as JSON: tells whether two evaluations asked the same."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def start_evaluation(folder: EvaluationFolder, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Make the folder of an evaluation and lock it, or find it; True when it is finished already, with the same settings.

    With `overwrite` what is there is kept under another name. ValueError when it was made with other settings.
    """
    state = PartialState()
    take_lock(folder.folder, "an evaluation")
    before = None if overwrite else folder.settings()
    if before is not None and (changed := changed_settings(before, settings)):
        raise ValueError(
            f"{folder.folder}: an evaluation with other settings is here ({'; '.join(changed)}). Run it with the old "
            "ones to see it, or with --overwrite to make a new one (the old one is kept under another name)"
        )
    finished = not overwrite and bool(folder.metrics())
    if finished and has_manifest(folder.folder):
        refuse_together(lambda: describe_damage(folder.folder))
    state.wait_for_everyone()
    if state.is_main_process:
        if overwrite and folder.folder.exists():
            print(f"The evaluation before is kept as {set_aside(folder.folder)}")
        if before is None:
            folder.begin(settings)
    state.wait_for_everyone()
    return finished


def describe_damage(folder: Path) -> str | None:
    """A sentence that names what of a finished evaluation is not as it was written; None where all is."""
    problems = manifest_problems(folder)
    remedy = "--overwrite evaluates anew; the damaged evaluation is kept beside it"
    return f"{folder}: damaged: {'; '.join(problems)}. {remedy}" if problems else None


def answer_with_both(
    run: Path, base: str, rows: Dataset, folder: EvaluationFolder, *, batch_size: int | str, max_new_tokens: int
) -> dict[str, list[str]]:
    """Greedy answers of the `base` and the `tuned` model, one per row, in order, on every process.

    `rows` have `messages` that end with a user turn (and `images`). Both models get the same prompts, made by the run's
    own processor; of an adapter and its base each picture is opened and preprocessed once. Answers are kept in `folder`
    as they come; those of an evaluation that was stopped are not asked again.
    """
    answers = folder.kept(MODELS)
    missing = [name for name in ("tuned", "base") if len(answers[name]) < len(rows)]
    if not missing:
        return answers
    model, processing_class = load_for_inference(str(run))

    def ask(names: Sequence[str], start: int, stop: int) -> None:
        windows = answer_rows(
            model,
            processing_class,
            rows.select(range(start, stop)),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            names=names,
            description=f"Asking the {' and the '.join(names)} model",
        )
        for window in windows:
            for name, new in window.items():
                if PartialState().is_main_process:
                    folder.keep(name, len(answers[name]), new)
                answers[name] += new

    if isinstance(model, PeftModel):
        # Both at once. A stop may have come between two writes: the model that is behind catches up first.
        behind, ahead = sorted(MODELS, key=lambda name: len(answers[name]))
        if len(answers[behind]) < len(answers[ahead]):
            ask([behind], len(answers[behind]), len(answers[ahead]))
        if len(answers[ahead]) < len(rows):
            ask(("tuned", "base"), len(answers[ahead]), len(rows))
        return answers
    for name in missing:
        if name == "base":
            # Every weight was trained: the base is another model, and one of the two is in memory at a time.
            del model
            gc.collect()
            torch.cuda.empty_cache()
            model, _ = load_for_inference(base, asked_by=processing_class)
        ask([name], len(answers[name]), len(rows))
    return answers


def read_answers(folder: EvaluationFolder) -> dict[str, list[str]]:
    """The answers of a finished evaluation, of `base` and `tuned`, in the order in which they were asked."""
    lines = [json.loads(line) for line in folder.answers_file.read_text(encoding="utf-8").splitlines()]
    return {name: [line[name] for line in lines] for name in MODELS}
