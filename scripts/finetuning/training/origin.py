"""What a run was begun with: fingerprints of its data, its base model and its template, compared whenever it is used.

A training that goes on, an evaluation, a merge and answers are refused where one of them is another, unless the change is
accepted.
"""

import hashlib
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedConfig

from finetuning import run_folder
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.fingerprints import changed_files, changes, of_dataset, of_mixture, of_model
from finetuning.main_process import found_by_main
from finetuning.manifest import HASH
from finetuning.models.processing import load_config, template_path


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


def of_base(name: str, config: PreTrainedConfig) -> str | None:
    """The fingerprint of a model's folder; of a Hub model its commit."""
    return of_model(name) or getattr(config, "_commit_hash", None)


def refuse_changed_run(run: Path, base: str | None, dataset: str | None, *, accept_changes: bool) -> list[str]:
    """What differs from the finished run: its own files, its base, and `dataset` where it is the run's; on all processes.

    Raises ValueError in all of them where something does and `accept_changes` is not set.
    """

    def differences() -> list[str]:
        found = changed_files(run, base, dataset)
        if base and not Path(base).is_dir():
            revision = (run_folder.read_arguments(run) or {}).get("model_revision", "main")
            commit = of_base(base, load_config(base, revision))
            found += changes(run, {"base": commit} if commit else {})
        return found

    found = found_by_main(differences)
    if found and not accept_changes:
        raise ValueError(
            f"{run}: {'; '.join(found)}: not as it was left. Restore it, or add --accept_changes, which the result will note"
        )
    if found and PartialState().is_main_process:
        print(f"{run}: accepted as it is now: {'; '.join(found)}", file=sys.stderr)
    return found


def note(folder: Path, found: dict[str, str], accepted: list[str]) -> None:
    """Keep the fingerprints in `begun_with.json`, and which changes were accepted when."""
    before: list[dict[str, object]] = run_folder.read_begun_with(folder).get("accepted", [])
    if accepted:
        before = [*before, {"at": run_folder.now(), "changes": accepted}]
    run_folder.write_begun_with(folder, {HASH: found} | ({"accepted": before} if before else {}))
