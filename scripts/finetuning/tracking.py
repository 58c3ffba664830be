"""TensorBoard always; W&B as well where the environment can reach it; one W&B run per training, however often restarted.

No tracker stops a run: one that cannot be reached is told in one line, and W&B logs into the run's folder instead.
"""

import base64
import contextlib
import hashlib
import importlib.util
import json
import netrc
import os
import secrets
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image, ImageDraw
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import rewrite_logs

from finetuning.pages import AnswerTable, markdown_table
from finetuning.run_folder import BOOKKEEPING, TENSORBOARD, read_arguments, read_progress, wandb_id

PROJECT = "llava-gemma-finetuning"
OTHER_TRACKERS = ("mlflow", "trackio")  # by report_to; not among the requirements
PATIENCE = 5.0  # seconds for a tracker's server to answer
THUMBNAIL = 160  # pixels, longest side, in TensorBoard's picture of the answers


def wandb_is_set_up() -> bool:
    """Whether W&B can log without asking: a key in the environment or in ~/.netrc, or offline mode."""
    if importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if parse_flag_from_env("WANDB_DISABLED"):
        PartialState().print("W&B: off, as WANDB_DISABLED says; TensorBoard keeps the curves")
        return False
    return os.environ.get("WANDB_MODE") == "offline" or wandb_key() is not None


def wandb_key() -> str | None:
    """The key of the environment or of ~/.netrc; None without one."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        login = netrc.netrc().authenticators(urllib.parse.urlsplit(wandb_server()).hostname or "")
    except (FileNotFoundError, netrc.NetrcParseError):
        return None
    return login[2] if login else None


def wandb_server() -> str:
    """Where W&B's interface is."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def reason_against_wandb() -> str | None:
    """Why W&B cannot be logged to online: no network, or a key that it does not know; None where it can.

    Asked here, in seconds, because `wandb.init` itself tries for minutes, and then ends the run.
    """
    key = base64.b64encode(f"api:{wandb_key()}".encode()).decode()
    request = urllib.request.Request(  # noqa: S310 - the server is the user's own setting
        f"{wandb_server()}/graphql",
        json.dumps({"query": "{ viewer { username } }"}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            viewer = (json.load(answer).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return f"{wandb_server()} refuses the key" if error.code in (401, 403) else f"{wandb_server()}: {error}"
    except (OSError, ValueError) as error:
        return f"{wandb_server()} cannot be reached ({getattr(error, 'reason', error)})"
    return None if viewer else f"{wandb_server()} refuses the key"


def set_up(output_dir: str, run_name: str | None, report_to: Sequence[str] = ()) -> list[str]:
    """Begin (or go on with) the tracking of the run in `output_dir`; what its trainer reports to.

    TensorBoard always, W&B where it is set up, MLflow and Trackio where `report_to` names them. The W&B run's id is kept
    in the folder, so that a restart continues the same run; its config is the folder's `arguments.yaml`. WANDB_PROJECT,
    WANDB_RUN_GROUP, WANDB_TAGS and a sweep's WANDB_RUN_ID are honoured.
    """
    folder = Path(output_dir)
    # One folder for all attempts: TensorBoard then draws one curve.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PATIENCE:.0f}")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    trackers = ["tensorboard", *(name for name in OTHER_TRACKERS if name in report_to)]
    if not wandb_is_set_up():
        return trackers
    if PartialState().is_main_process:
        if os.environ.get("WANDB_MODE") != "offline" and (reason := reason_against_wandb()):
            os.environ["WANDB_MODE"] = "offline"
            print(f"W&B: {reason}. Logged offline; the end says the command that uploads it")
        open_wandb(folder, run_name)
    return [*trackers, "wandb"]


def refuse_unknown_trackers(report_to: Sequence[str]) -> None:
    """Raise ValueError for trackers that are not there, or that nothing here reports to."""
    known = ("tensorboard", "wandb", *OTHER_TRACKERS)
    problems = [f"report_to: {name} is not one of {', '.join(known)}" for name in report_to if name not in known]
    problems += [
        f"report_to: {name} is not installed: pip install {name}"
        for name in OTHER_TRACKERS
        if name in report_to and importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ValueError("; ".join(problems))


def open_wandb(folder: Path, run_name: str | None) -> None:
    """Begin, or go on with, the W&B run of this folder."""
    import wandb

    arguments = read_arguments(folder) or {}
    facts = facts_of_the_run(arguments.get("dataset_name", ""))
    tags = [f"{name}:{value}"[:64] for name, value in facts.items()]
    # At the end a network that is gone is waited for as long; an adapter takes its time.
    patience = 600.0 if arguments.get("log_adapter") else 2 * PATIENCE
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=wandb_id(folder, os.environ.get("WANDB_RUN_ID", secrets.token_hex(4))),
        resume="allow",
        name=os.environ.get("WANDB_NAME") or run_name or folder.name,
        group=os.environ.get("WANDB_RUN_GROUP") or group_of_the_job(),
        tags=[tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag] + tags,
        job_type="train",
        dir=str(folder),
        config=arguments | facts,
        settings=wandb.Settings(finish_timeout=patience),
    )
    wandb.define_metric("train/global_step")
    wandb.define_metric("*", step_metric="train/global_step", step_sync=True)


class NeverStops(TrainerCallback):
    """Trackers' callbacks; one that fails is told no more: a training does not end for its curves."""

    def __init__(self, *callbacks: TrainerCallback):
        self.callbacks = list(callbacks)

    def tell(self, event: str, args, state, control, **kwargs) -> None:
        """Pass an event on."""
        for callback in list(self.callbacks):
            try:
                getattr(callback, event)(args, state, control, **kwargs)
            except Exception as error:
                name = type(callback).__name__.removesuffix("Callback")
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"{name}: told no more, because it failed ({reason}). TensorBoard has the curves")
                self.callbacks.remove(callback)


for _event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    setattr(NeverStops, _event, partialmethod(NeverStops.tell, _event))


def tell_wandb(args: TrainingArguments, state: TrainerState, action: Callable[[], None]) -> None:
    """Do `action`; when W&B's own process is gone, start another, tell it this attempt's history, and do it then.

    Slurm's TERM goes to every process of a step. Training outlives it, W&B's process does not, and what it had not
    yet written is lost.
    """
    import wandb

    try:
        action()
    except ConnectionError:
        with contextlib.suppress(ConnectionError):
            wandb.teardown()
        folder = Path(args.output_dir)
        open_wandb(folder, args.run_name)
        from_step = read_progress(folder)["attempts"][-1]["from_step"]
        for entry in state.log_history:
            if entry["step"] > from_step:
                logs = {name: value for name, value in entry.items() if name != "step"}
                wandb.log(rewrite_logs(logs) | {"train/global_step": entry["step"]})
        action()


class WandbCallbackThatReturns(WandbCallback):
    """transformers' callback, with a W&B process that may end before the training does."""

    def on_log(self, args, state, control, **kwargs):
        """As transformers does, unless the W&B process has ended; main process only."""
        if state.is_world_process_zero:
            tell_wandb(args, state, partial(super().on_log, args, state, control, **kwargs))


def facts_of_the_run(dataset_name: str) -> dict[str, Any]:
    """What to find a run by: strategy, number of processes, commit, manifest of the data, and job and nodes under Slurm."""
    state = PartialState()
    facts: dict[str, Any] = {
        "strategy": os.environ.get("STRATEGY", state.distributed_type.value),
        "processes": state.num_processes,
    }
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        facts["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass  # unpacked from an archive: there is no commit to name
    manifest = Path(dataset_name) / "manifest.json"
    if manifest.is_file():
        facts["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    for name, variable in (("job", "SLURM_JOB_ID"), ("nodes", "SLURM_JOB_NODELIST")):
        if variable in os.environ:
            facts[name] = os.environ[variable]
    return facts


def group_of_the_job() -> str | None:
    """Runs of one array (a sweep) are a group; other runs group by the job's name."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"array-{array}"
    return os.environ.get("SLURM_JOB_NAME")


def wandb_address(args: TrainingArguments) -> str | None:
    """The run's page; offline the command that uploads it, all attempts. None without W&B or in other processes."""
    if "wandb" not in args.report_to:
        return None
    import wandb

    if wandb.run is None:
        return None
    # run.dir is <run>/wandb/offline-run-<moment>-<id>/files
    return wandb.run.url or f"wandb sync {Path(wandb.run.dir).parents[1] / 'offline-run-*'}"


def close(args: TrainingArguments, state: TrainerState, exit_code: int, metrics: dict[str, Any] | None = None) -> None:
    """End the W&B run of this process: with its metrics (and its adapter, when asked) or as interrupted. Main process.

    `metrics` of a completed run hold its `verdict`, a sentence.
    """
    if "wandb" not in args.report_to:
        return
    tell_wandb(args, state, partial(_close, args, exit_code, metrics))


def _close(args: TrainingArguments, exit_code: int, metrics: dict[str, Any] | None) -> None:
    import wandb

    if metrics is None:
        wandb.run.mark_preempting()
    else:
        wandb.run.summary.update(metrics)
        if wandb.run.config.get("log_adapter"):
            artifact = wandb.Artifact(f"adapter-{wandb.run.id}", type="model", metadata=metrics)
            for path in sorted(Path(args.output_dir).iterdir()):
                if path.is_file() and path.name not in BOOKKEEPING:
                    artifact.add_file(str(path))
            wandb.run.log_artifact(artifact)
    address = wandb_address(args)
    wandb.finish(exit_code=exit_code)
    print(f"W&B: {address}")


def log_answers(trainer: Trainer, table: AnswerTable) -> None:
    """The answers of an evaluation, pictures as pictures, as a W&B table and in TensorBoard; main process only."""
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            words = {name: values for name, values in table.columns.items() if name != "image"}
            callback.tb_writer.add_text(
                "eval/answers", markdown_table(list(words), list(zip(*words.values(), strict=True))), step
            )
            if "image" in table.columns:
                callback.tb_writer.add_image("eval/answers", contact_sheet(table), step, dataformats="HWC")
            callback.tb_writer.flush()
    if "wandb" not in trainer.args.report_to:
        return
    import wandb

    def log_table() -> None:
        columns = {
            name: [wandb.Image(value) if isinstance(value, Image.Image) else value for value in values]
            for name, values in table.columns.items()
        }
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        wandb.log({"eval/answers": wandb.Table(columns=list(columns), data=rows), "train/global_step": step})

    tell_wandb(trainer.args, trainer.state, log_table)


def contact_sheet(table: AnswerTable, num_columns: int = 8) -> np.ndarray:
    """Thumbnails of the questions' pictures with their captions, right ones in green: (height, width, 3), uint8."""
    caption = 14
    num_rows = -(-len(table.captions) // num_columns)
    sheet = Image.new("RGB", (num_columns * THUMBNAIL, num_rows * (THUMBNAIL + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, (text, right)) in enumerate(zip(table.columns["image"], table.captions, strict=True)):
        left, top = number % num_columns * THUMBNAIL, number // num_columns * (THUMBNAIL + caption)
        if image is not None:
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
            sheet.paste(thumbnail, (left, top + caption))
        draw.text((left + 2, top + 1), text, fill="darkgreen" if right else "darkred")
    return np.asarray(sheet)
