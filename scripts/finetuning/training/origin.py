"""What a run was begun with: fingerprints of its data, its base model and its template, compared whenever it is used.

A training that goes on, an evaluation and a merge are refused where one of them is another, unless the change is accepted.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedConfig

from finetuning import run_folder
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.main_process import found_by_main
from finetuning.manifest import HASH, describe_files, described_files, has_manifest, manifest_problems
from finetuning.models.processing import load_config, template_path

# Of a base model: weights, and what makes tokens and pixels of its inputs.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja")
# Of a dataset that was not prepared here: what `load_dataset` reads. The library keeps caches beside a saved dataset's files.
DATA_FILES = ("**/*.jsonl", "**/*.json", "**/*.parquet", "**/*.csv", "**/data-*.arrow")
WORDS = {
    "dataset": "the rows of --dataset_name",
    "mixture": "the rows of --dataset_mixer",
    "base": "the files of --model_name_or_path",
    "template": "the chat template",
}


def fingerprints(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments, config: PreTrainedConfig
) -> dict[str, str]:
    """Hashes of `dataset`, `base` and `template`, as far as they lie on this machine; a Hub model's commit.

    Read by the main process; empty in the others.
    """
    if not PartialState().is_main_process:
        return {}
    found = {
        "dataset": of_dataset(script_args.dataset_name),
        "mixture": of_mixture(script_args.dataset_mixer or {}),
        "base": of_base(model_args.model_name_or_path, config),
    }
    template = template_path(config, training_args.chat_template_path)
    if template is not None:
        found["template"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    return {name: value for name, value in found.items() if value}


def of_dataset(name: str) -> str | None:
    """The fingerprint of a dataset's folder: of a prepared one by its manifest, with which `open_dataset` compares all."""
    folder = Path(name)
    described = described_files(folder) if (folder / "dataset_dict.json").is_file() else None
    return _digest(described) if described is not None else of_folder(folder, DATA_FILES)


def of_base(name: str, config: PreTrainedConfig) -> str | None:
    """The fingerprint of a model's folder; of a Hub model its commit."""
    return of_folder(Path(name), MODEL_FILES) or getattr(config, "_commit_hash", None)


def of_mixture(mixer: Iterable[str]) -> str | None:
    """A hash over the sets that are mixed in, of those that are folders; None without any."""
    described = {name: of_dataset(name) for name in mixer}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest() if described else None


def of_folder(folder: Path, patterns: Iterable[str]) -> str | None:
    """A hash over names and contents of a folder's files; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return _digest(describe_files(folder, sorted({path for pattern in patterns for path in folder.glob(pattern)})))


def _digest(described: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def refuse_changed_run(
    run: Path, arguments: dict[str, Any], base: str, dataset: str | None, *, accept_changes: bool
) -> list[str]:
    """What differs from the finished run: its own files, its base, and `dataset` where it is the run's; on all processes.

    Raises ValueError in all of them where something does and `accept_changes` is not set.
    """

    def differences() -> list[str]:
        config = load_config(base, arguments.get("model_revision", "main"))
        now = {"base": of_base(base, config), "dataset": of_dataset(dataset) if dataset else None}
        damaged = manifest_problems(run) if has_manifest(run) else []
        return damaged + changes(run, {name: value for name, value in now.items() if value})

    found = found_by_main(differences)
    if found and not accept_changes:
        raise ValueError(
            f"{run}: {'; '.join(found)}: not as the run left it. Restore it, or add --accept_changes, which the result "
            "will note"
        )
    return found


def changes(folder: Path, found: dict[str, str]) -> list[str]:
    """What differs from what the run in `folder` was begun with, for people; empty for runs that kept nothing."""
    kept = run_folder.read_begun_with(folder).get(HASH, {})
    return [
        f"{WORDS[name]} ({kept[name][:12]} -> {value[:12]})"
        for name, value in found.items()
        if name in kept and kept[name] != value
    ]


def note(folder: Path, found: dict[str, str], accepted: list[str]) -> None:
    """Keep the fingerprints in `begun_with.json`, and which changes were accepted when."""
    before: list[dict[str, Any]] = run_folder.read_begun_with(folder).get("accepted", [])
    if accepted:
        before = [*before, {"at": run_folder.now(), "changes": accepted}]
    run_folder.write_begun_with(folder, {HASH: found} | ({"accepted": before} if before else {}))
