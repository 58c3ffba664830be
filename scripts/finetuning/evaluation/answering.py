"""Answers of a run and of its base to the same questions: asked once, kept as they come, continued after a stop."""

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from finetuning.data.count_tree import CountTree
from finetuning.folder_lock import take_lock
from finetuning.inference.generation import LIKELIHOODS, answer_rows, packs
from finetuning.inference.vllm_engine import answer_by_vllm
from finetuning.kernels.int8_base import refuse_base_precision, set_base_precision
from finetuning.main_process import refuse_together
from finetuning.manifest import has_manifest, manifest_problems
from finetuning.models.loading import load_for_inference
from finetuning.models.picture_parameters import without_adapter
from finetuning.models.processing import load_saved_processing_class
from finetuning.run_folder import EvaluationFolder, adapter_base, changed_settings, set_aside

MODELS = ("base", "tuned")


class AskedModels:
    """The tuned model of a run and its base, loaded when they are first asked, one at a time in memory.

    An adapter and its base are one model, the adapter switched off for the base. Both get the run's own processor.
    `base_precision` is a recipe's: "int8", or None. Raises ValueError where the GPU cannot do it.
    """

    def __init__(self, run: Path, base: str, base_precision: str | None = None):
        refuse_base_precision(base_precision)
        self.run, self.base, self.is_adapter = run, base, adapter_base(run) is not None
        self.base_precision = base_precision
        self.processing_class = load_saved_processing_class(run)
        self.model: PreTrainedModel | PeftModel | None = None
        self.source: str | None = None

    def load(self, name: str) -> PreTrainedModel | PeftModel:
        """The model `tuned` or `base`; of an adapter the PeftModel for both."""
        source = str(self.run) if name == "tuned" or self.is_adapter else self.base
        if source != self.source:
            self.model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            asked_by = None if source == str(self.run) else self.processing_class
            self.model, _ = load_for_inference(source, asked_by=asked_by)
            set_base_precision(self.model, self.base_precision, self.run)
            self.source = source
        return self.model

    @contextmanager
    def as_named(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model of that name, an adapter off for the base."""
        model = self.load(name)
        with without_adapter(model) if name == "base" and isinstance(model, PeftModel) else nullcontext():
            yield model


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
    models: AskedModels,
    rows: Dataset,
    folder: EvaluationFolder,
    *,
    batch_size: int | str,
    max_new_tokens: int,
    trees: Mapping[int, CountTree] | None = None,
    engine: str = "built-in",
) -> tuple[dict[str, list[str]], dict[int, list[float]]]:
    """Greedy answers of the `base` and the `tuned` model, one per row, in order, on every process.

    `rows` have `messages` that end with a user turn (and `images`). Both models get the same prompts, made by the run's
    own processor; of an adapter and its base each picture is opened and preprocessed once. Answers are kept in `folder`
    as they come; those of an evaluation that was stopped are not asked again.

    With `engine="vllm"` vLLM answers, which tells nothing of counts. The second result are the log-likelihoods of counts by row, of rows in `trees` that the tuned model answered now.
    """
    answers = folder.kept(MODELS)
    likelihoods: dict[int, list[float]] = {}

    def ask(names: Sequence[str], start: int, stop: int) -> None:
        asked = rows.select(range(start, stop))
        if engine == "vllm":
            name = str(models.run) if models.is_adapter or names[0] == "tuned" else models.base
            windows = answer_by_vllm(
                *(name, models.base, models.processing_class, asked), max_new_tokens=max_new_tokens, names=names
            )
        else:
            model = models.load(names[0])
            reads = trees is not None and names[0] == "tuned" and packs(model)
            windows = answer_rows(
                *(model, models.processing_class, asked),
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                names=names,
                trees={number - start: tree for number, tree in trees.items() if number >= start} if reads else None,
                description=f"Asking the {' and the '.join(names)} model",
            )
        done = start
        for window in windows:
            for name in names:
                if PartialState().is_main_process:
                    folder.keep(name, len(answers[name]), window[name])
                answers[name] += window[name]
            read = enumerate(window.get(LIKELIHOODS, []), done)
            likelihoods.update({number: values for number, values in read if values is not None})
            done += len(window[names[0]])

    if models.is_adapter:
        # Both at once. A stop may have come between two writes: the model that is behind catches up first.
        behind, ahead = sorted(MODELS, key=lambda name: len(answers[name]))
        if len(answers[behind]) < len(answers[ahead]):
            ask([behind], len(answers[behind]), len(answers[ahead]))
        if len(answers[ahead]) < len(rows):
            ask(("tuned", "base"), len(answers[ahead]), len(rows))
        return answers, likelihoods
    for name in ("tuned", "base"):
        if len(answers[name]) < len(rows):
            ask([name], len(answers[name]), len(rows))
    return answers, likelihoods


def read_answers(folder: EvaluationFolder) -> dict[str, list[str]]:
    """The answers of a finished evaluation, of `base` and `tuned`, in the order in which they were asked."""
    lines = [json.loads(line) for line in folder.answers_file.read_text(encoding="utf-8").splitlines()]
    return {name: [line[name] for line in lines] for name in MODELS}
