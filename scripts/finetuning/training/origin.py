"""What a run was begun with: fingerprints of its data, its base model and its template, compared whenever it goes on."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedConfig

from finetuning import run_folder
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.manifest import describe_files
from finetuning.models.loading import template_path

# Of a base model: weights, and what makes tokens and pixels of its inputs.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja")
WORDS = {
    "dataset": "the rows of --dataset_name",
    "mixture": "the rows of --dataset_mixer",
    "base": "the files of --model_name_or_path",
    "template": "the chat template",
}


def fingerprints(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments, config: PreTrainedConfig
) -> dict[str, str]:
    """SHA-256 of `dataset`, `base` and `template`, as far as they lie on this machine; a Hub model's commit.

    Read by the main process; empty in the others.
    """
    if not PartialState().is_main_process:
        return {}
    found = {
        "dataset": of_folder(Path(script_args.dataset_name), ("**/*.arrow",)),
        "mixture": of_mixture(script_args.dataset_mixer or {}),
        "base": of_folder(Path(model_args.model_name_or_path), MODEL_FILES) or getattr(config, "_commit_hash", None),
    }
    template = template_path(config, training_args.chat_template_path)
    if template is not None:
        found["template"] = hashlib.sha256(Path(template).read_bytes()).hexdigest()
    return {name: value for name, value in found.items() if value}


def of_mixture(mixer: Iterable[str]) -> str | None:
    """SHA-256 over the sets that are mixed in, of those that are folders; None without any."""
    described = {name: of_folder(Path(name), ("**/*.arrow",)) for name in mixer}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest() if described else None


def of_folder(folder: Path, patterns: Iterable[str]) -> str | None:
    """SHA-256 over names and contents of a folder's files; None where there is no such folder."""
    if not folder.is_dir():
        return None
    described = describe_files(folder, sorted({path for pattern in patterns for path in folder.glob(pattern)}))
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def changes(folder: Path, found: dict[str, str]) -> list[str]:
    """What differs from what the run in `folder` was begun with, for people; empty for runs that kept nothing."""
    kept = run_folder.read_begun_with(folder).get("sha256", {})
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
    run_folder.write_begun_with(folder, {"sha256": found} | ({"accepted": before} if before else {}))
