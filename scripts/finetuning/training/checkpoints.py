"""Checkpoints that are whole or absent: written aside, read back, then moved into place."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from finetuning import run_folder, upstream
from finetuning.failures import writing
from finetuning.manifest import (
    files_in,
    follow_umask,
    has_manifest,
    manifest_problems,
    sync,
    write_manifest_while_syncing,
)
from finetuning.strategy import Strategy

# What names of weights begin with, one process's or all of them: adapters, whole models, shards of FSDP2.
WEIGHTS = ("adapter_model", "model", "pytorch_model")


@upstream.overrides
class CheckpointingTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are moved into place only when they are whole."""

    def __init__(self, *args, **kwargs):
        self._saving = False
        self.strategy = Strategy.from_environment()
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, run_folder.UNFINISHED) if self._saving else folder

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL's card asks a time-machine question of a model named None. Merging writes a true one."""

    def _save_checkpoint(self, model, trial) -> None:
        """Save under `unfinished/`, prove it readable, move it into place; only then delete old checkpoints."""
        run, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / run_folder.UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            with writing(run / run_folder.UNFINISHED, SafetensorError):
                super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        unfinished, final = run / run_folder.UNFINISHED / name, run / name
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            with writing(unfinished):
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                run_folder.copy_into_checkpoint(run, unfinished)
                put_in_place(unfinished, final, needs_optimizer=not self.args.save_only_model)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,  # a broken one of a later step, passed over by a restart, is not the newest
            )
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args, **kwargs):
        # Killed between its last checkpoint and its end, a run would be resumed with one more step (transformers 5.23, 5.24).
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._holds_full_model():
            load_saved_weights(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._holds_full_model():
            load_saved_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_full_model(self) -> bool:
        # Sharded weights, and adapters, have loaders of their own.
        is_adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return self.strategy.replicates and not is_adapted


def load_saved_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load all weights of `checkpoint` into `model`, in place. Raises RuntimeError where names or shapes differ.

    transformers' Trainer reads the file as it is. For LLaVA the names on disk are not those of the model (`from_pretrained`
    renames them), so it loads nothing, warns, and goes on with the weights it has (transformers 5.23 and 5.24).
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


def put_in_place(unfinished: Path, final: Path, *, needs_optimizer: bool = True) -> None:
    """Move a written checkpoint to where a restart looks for it. Raises OSError, and moves nothing, if it is not whole."""
    problems = checkpoint_problems(unfinished, needs_optimizer=needs_optimizer)
    if problems:
        raise OSError(
            f"{unfinished}: written, but cannot be read back: {'; '.join(problems)}. Is the disk full or failing?"
        )
    follow_umask(files_in(unfinished))
    write_manifest_while_syncing(unfinished)
    if final.exists():  # one that a restart found unreadable, and whose step has come again
        final.rename(unfinished.parent / "replaced")
    unfinished.rename(final)
    sync([final.parent])
    shutil.rmtree(unfinished.parent)


def checkpoint_problems(checkpoint: Path, *, needs_optimizer: bool = True) -> list[str]:
    """What keeps a checkpoint from being continued, file by file; empty when nothing does.

    Every file is compared with the manifest. Of a checkpoint without one are read: the trainer's state, the headers of
    the safetensors files (whose offsets must fit the file's size), and the directories at the end of PyTorch's archives,
    which a file that was cut off lacks.
    """
    problems = manifest_problems(checkpoint) if has_manifest(checkpoint) else structure_problems(checkpoint)
    try:
        step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
            problems.append(f"{TRAINER_STATE_NAME} is of step {step}")
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{TRAINER_STATE_NAME}: {error}")
    parts = {part for path in files_in(checkpoint) for part in path.relative_to(checkpoint).parts}
    if needs_optimizer and not any("optim" in part for part in parts):
        problems.append("no state of the optimizer")
    if not any(part.endswith("model_states.pt") or part.startswith(WEIGHTS) for part in parts):
        problems.append("no weights")
    if "optimizer.pt" in parts:
        kinds = {"scheduler.pt": "learning-rate schedule", "rng_state": "random numbers"}
        for start, what in kinds.items():
            if not any(part.startswith(start) for part in parts):
                problems.append(f"no state of the {what} ({start})")
    return problems


def structure_problems(checkpoint: Path) -> list[str]:
    """Files that are empty, cut off, or not what their names say."""
    problems = []
    for path in files_in(checkpoint):
        name = path.relative_to(checkpoint)
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                problems.append(f"{name}: {error}")
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            problems.append(f"{name}: cut off")
        elif path.stat().st_size == 0:
            problems.append(f"{name}: empty")
    return problems


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be continued; newer ones that cannot are named and passed over.

    None when there is none. Raises ValueError when there are checkpoints and not one is whole: to begin anew would be
    to lose the run without a word.
    """
    steps = run_folder.checkpoints(folder)
    passed_over = []
    for step in sorted(steps, reverse=True):
        problems = checkpoint_problems(steps[step])
        if not problems:
            if passed_over and PartialState().is_main_process:
                print("Passed over, not whole: " + "\n".join(passed_over))
            return steps[step]
        passed_over.append(f"{steps[step]}: {'; '.join(problems)}")
    if passed_over:
        raise ValueError(
            "no checkpoint of this run can be continued. Delete them to begin anew, or restore one:\n  "
            + "\n  ".join(passed_over)
        )
    return None
