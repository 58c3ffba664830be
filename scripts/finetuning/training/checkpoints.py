"""Runs that survive: a signal ends training at a step that all processes agree on, and checkpoints are whole or absent.

transformers' own `enable_jit_checkpoint` (5.23) does not do here: it knows SIGTERM only, each process saves at the step
where the signal finds it (so several processes save different steps, or wait for each other for ever), it writes in
place, and the command ends as if training were complete.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from finetuning import run_folder, tracking, upstream

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not failed, run it again


class StopRequest:
    """Remembers the first of the stop signals: TERM (preemption), USR1, USR2 (a warning before the time limit).

    `STOP_SIGNALS=TERM,USR2` in the environment leaves USR1 to others. Processes forked from this one (DataLoader
    workers) inherit the handler and must not act on it.
    """

    def __init__(self):
        names = os.environ.get("STOP_SIGNALS", "TERM,USR1,USR2").split(",")
        unknown = [name for name in names if f"SIG{name}" not in signal.Signals.__members__]
        if unknown:
            raise ValueError(
                f"STOP_SIGNALS={','.join(names)}: no such signals: {', '.join(unknown)}; try TERM,USR1,USR2"
            )
        self.signals = [signal.Signals[f"SIG{name}"] for name in names]
        self.received = 0  # number of the signal that this process got
        self.agreed = 0  # of the one that all processes know of
        self._asked: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def _remember(self, number: int, frame: object) -> None:
        if os.getpid() == self._process and not self.received:
            self.received = number

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._remember) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; called by all processes at the same step.

        On several GPUs it is the answer to the call before: to read the newest one, host and GPU would wait for each
        other at every step.
        """
        if not torch.distributed.is_initialized():
            self.agreed = self.received
            return self.agreed > 0
        number = torch.full((), self.received, device=device)  # filled there: a copy would wait for the whole step
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        if device.type != "cuda":
            self.agreed = int(number)
            return self.agreed > 0
        if self._asked is not None:
            answer, arrived = self._asked
            arrived.synchronize()
            self.agreed = int(answer)
        answer, arrived = torch.empty_like(number, device="cpu", pin_memory=True), torch.cuda.Event()
        answer.copy_(number, non_blocking=True)
        arrived.record()
        self._asked = answer, arrived
        return self.agreed > 0

    @property
    def reason(self) -> str:
        return signal.Signals(self.agreed).name


def _obey_parent_only(worker: int, signals: list[signal.Signals], then: partial | None) -> None:
    # Slurm signals every process of a step. PyTorch's loader workers die of TERM, and the run with them; but their own
    # process ends them by TERM too, and would wait for ever for one that ignores it.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def listen() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    if then is not None:
        then(worker)


class StopTogether(TrainerCallback):
    """Ends training at the step at which the processes learn of a stop signal, with a checkpoint of that very step."""

    def __init__(self, request: StopRequest):
        self.request = request

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            args.eval_on_start = self._evaluation_is_owed(args, state)

    def _evaluation_is_owed(self, args, state) -> bool:
        # An evaluation that was due at the step of the signal is made up for now: it can take longer than the grace.
        if args.eval_strategy == "steps":
            due = state.global_step % state.eval_steps == 0
        else:
            due = args.eval_strategy == "epoch" and float(state.epoch).is_integer()
        return due and not any(
            "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
        )

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step there is nothing left to interrupt.
        if self.request.agree(args.device) and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        # The trainer takes the end of an interrupted epoch for the end of an epoch.
        if self.request.agreed and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_evaluate = False


class ShowProgress(TrainerCallback):
    """Keeps `progress.json` up to date at every log; `headlines`: metric of the answers -> what to call it there."""

    def __init__(self, headlines: dict[str, str]):
        self.headlines = headlines

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._from_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        known = run_folder.read_progress(folder)
        known |= {"step": state.global_step, "max_steps": state.max_steps, "logged_at": run_folder.now()}
        steps = state.global_step - self._from_step
        if steps:
            known["seconds_per_step"] = round((time.monotonic() - self._began) / steps, 4)
        known |= {name: logs[name] for name in ("loss", "eval_loss", "samples_per_second") if name in logs}
        scores = {label: logs[f"eval_{name}"] for name, label in self.headlines.items() if f"eval_{name}" in logs}
        if scores:
            known["scores"] = known.get("scores", {}) | scores
        if address := tracking.wandb_address(args):
            known["wandb"] = address
        run_folder.write_progress(folder, known)


@upstream.overrides
class InterruptibleTrainer(SFTTrainer):
    """SFTTrainer that can be asked to stop, and whose checkpoints are moved into place only when they are whole."""

    def __init__(self, *args, headlines: dict[str, str] | None = None, **kwargs):
        self._saving = False
        self.stop_request = StopRequest()
        super().__init__(*args, **kwargs)
        if self.pop_callback(WandbCallback):
            self.add_callback(tracking.WandbCallbackThatReturns())
        self.add_callback(StopTogether(self.stop_request))
        self.add_callback(ShowProgress(headlines or {}))

    def train(self, *args, **kwargs):
        """Train; after a stop signal, save and leave the process with code 75: the same command continues."""
        attempts = run_folder.read_progress(Path(self.args.output_dir)).get("attempts", [])
        self._restarts = max(len(attempts) - 1, 0)
        with self.stop_request:
            result = super().train(*args, **kwargs)
        if self.stop_request.agreed and self.state.global_step < self.state.max_steps:
            if self.is_world_process_zero():
                self._report_interruption()
            self.accelerator.wait_for_everyone()
            # A job file is told by OUTCOME_FILE: `accelerate launch` turns 75 into 1 and a page of stack traces.
            sys.exit(0 if "OUTCOME_FILE" in os.environ else EXIT_INTERRUPTED)
        return result

    def _report_interruption(self) -> None:
        reason, step, folder = self.stop_request.reason, self.state.global_step, Path(self.args.output_dir)
        run_folder.end_attempt(folder, step, reason)
        tracking.close(self.args, self.state, EXIT_INTERRUPTED)
        print(f"Stopped at step {step} of {self.state.max_steps} ({reason}). The same command continues from there.")
        if outcome := os.environ.get("OUTCOME_FILE"):
            Path(outcome).parent.mkdir(parents=True, exist_ok=True)
            Path(outcome).write_text("interrupted\n", encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["restarts"] = self._restarts
        super().log(logs, start_time)

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's wrapper takes no new attributes
        listen = partial(_obey_parent_only, signals=self.stop_request.signals, then=inner.worker_init_fn)
        upstream.replace(inner, "worker_init_fn", listen)
        return loader

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, run_folder.UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Save under `unfinished/`, prove it readable, move it into place; only then delete old checkpoints."""
        run, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / run_folder.UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        unfinished, final = run / run_folder.UNFINISHED / name, run / name
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
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


def put_in_place(unfinished: Path, final: Path, *, needs_optimizer: bool = True) -> None:
    """Move a written checkpoint to where a restart looks for it. Raises OSError, and moves nothing, if it is not whole."""
    problems = checkpoint_problems(unfinished, needs_optimizer=needs_optimizer)
    if problems:
        raise OSError(
            f"{unfinished}: written, but cannot be read back: {'; '.join(problems)}. Is the disk full or failing?"
        )
    for path in [*unfinished.rglob("*"), unfinished]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if final.exists():  # one that a restart found unreadable, and whose step has come again
        final.rename(unfinished.parent / "replaced")
    unfinished.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree(unfinished.parent)


def checkpoint_problems(checkpoint: Path, *, needs_optimizer: bool = True) -> list[str]:
    """What keeps a checkpoint from being continued, file by file; empty when nothing does.

    Read are the trainer's state, the headers of the safetensors files (whose offsets must fit the file's size), and the
    directories at the end of PyTorch's archives, which a file that was cut off lacks.
    """
    problems = []
    try:
        step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
            problems.append(f"{TRAINER_STATE_NAME} is of step {step}")
    except (OSError, ValueError, KeyError) as error:
        problems.append(f"{TRAINER_STATE_NAME}: {error}")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if needs_optimizer and not any("optim" in part for path in files for part in path.relative_to(checkpoint).parts):
        problems.append("no state of the optimizer")
    for path in files:
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
                print("Passed over, incomplete: " + "\n".join(passed_over))
            return steps[step]
        passed_over.append(f"{steps[step]}: {'; '.join(problems)}")
    if passed_over:
        raise ValueError(
            "no checkpoint of this run can be continued. Delete them to begin anew, or restore one:\n  "
            + "\n  ".join(passed_over)
        )
    return None
