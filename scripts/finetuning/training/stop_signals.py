"""A signal ends training at a step that all processes agree on, with a checkpoint of that step.

transformers' own `enable_jit_checkpoint` (5.23) does not do here: it knows SIGTERM only, each process saves at the step
where the signal finds it (so several processes save different steps, or wait for each other for ever), it writes in
place, and the command ends as if training were complete.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finetuning import run_folder, tracking
from finetuning.command import is_launched, is_main_process, say_last
from finetuning.folder_lock import give_back
from finetuning.training.best_checkpoint import find_best

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not failed, run it again
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that the kernel sends a process whose parent has died
GRACE = 8  # seconds in which a process that lost its launcher may save
SAME_CTRL_C = 1.0  # seconds in which a second SIGINT is the first one's echo
SAVING = "\nCtrl-C: a checkpoint is saved at the end of this step. Once more, or kill -INT {}, ends at once; what is saved stays.\n"

asked_by_person = threading.Event()  # by Ctrl-C, or by closing the terminal


class StopRequest:
    """Remembers the first of the stop signals: TERM (preemption), USR1, USR2 (a warning before the time limit).

    `STOP_SIGNALS=TERM,USR2` in the environment leaves USR1 to others. INT (Ctrl-C) and HUP (the terminal was closed; not
    under nohup) are among them always. A second Ctrl-C ends the process at once. Processes forked from this one
    (DataLoader workers) inherit the handler and must not act on it.
    """

    def __init__(self):
        names = os.environ.get("STOP_SIGNALS", "TERM,USR1,USR2").split(",")
        unknown = [name for name in names if f"SIG{name}" not in signal.Signals.__members__]
        if unknown:
            raise ValueError(
                f"STOP_SIGNALS={','.join(names)}: no such signals: {', '.join(unknown)}; try TERM,USR1,USR2"
            )
        by_people = (
            [signal.SIGINT] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGINT, signal.SIGHUP]
        )
        self.signals = [*(signal.Signals[f"SIG{name}"] for name in names), *by_people]
        self.received = 0  # number of the signal that this process got
        self._pressed = 0.0  # when the first Ctrl-C came
        self.agreed = 0  # of the one that all processes know of
        self._asked: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def _remember(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return
        if number in (signal.SIGINT, signal.SIGHUP):
            asked_by_person.set()
        if number == signal.SIGINT:
            self._count_ctrl_c()
        if number == signal.SIGHUP and sys.stdout.isatty():
            leave_terminal()
        self.received = self.received or number

    def _count_ctrl_c(self) -> None:
        # torchrun passes on the Ctrl-C that the terminal has sent to all: that is no second one.
        if self._pressed and time.monotonic() - self._pressed > SAME_CTRL_C:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        elif not self._pressed:
            self._pressed = time.monotonic()
            if is_main_process():
                os.write(2, SAVING.format(os.getpid()).encode())  # print may be what was interrupted

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
        """Name of the signal that the processes agreed on, as SIGUSR2, or Ctrl-C."""
        return "Ctrl-C" if self.agreed == signal.SIGINT else signal.Signals(self.agreed).name


class StopTogether(TrainerCallback):
    """Ends training at the step at which the processes learn of a stop signal, with a checkpoint of that very step."""

    def __init__(self, request: StopRequest):
        self.request = request

    def on_train_begin(self, args, state, control, **kwargs):
        """After a restart: whether an evaluation is owed, and where the best checkpoint lies now."""
        if state.global_step:
            args.eval_on_start = self._evaluation_is_owed(args, state)
            state.best_model_checkpoint = find_best(args, state)

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
        """All processes save and stop at this step where one of them was told to."""
        # After the last step there is nothing left to interrupt.
        if self.request.agree(args.device) and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        """Nothing is saved or evaluated where a step has just stopped the training."""
        # The trainer takes the end of an interrupted epoch for the end of an epoch.
        if self.request.agreed and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_evaluate = False


def leave_terminal() -> None:
    """Write to a terminal no longer: it is closed, and every word would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def leave_interrupted(trainer: Any, reason: str) -> None:
    """End all processes with code 75, after the first has told people, trackers and the job file.

    A job file is told by OUTCOME_FILE, and the code is then 0: `accelerate launch` turns 75 into 1 and a page of traces.
    """
    if trainer.is_world_process_zero():
        state = trainer.state
        run_folder.end_attempt(Path(trainer.args.output_dir), state.global_step, reason)
        tracking.close(trainer.args, state, EXIT_INTERRUPTED)
        say_last(
            f"Stopped at step {state.global_step} of {state.max_steps} ({reason}). The same command continues from there."
        )
        if outcome := os.environ.get("OUTCOME_FILE"):
            Path(outcome).parent.mkdir(parents=True, exist_ok=True)
            run_folder.write_atomically(Path(outcome), "interrupted\n")
        give_back(Path(trainer.args.output_dir))
    trainer.accelerator.wait_for_everyone()
    sys.exit(0 if "OUTCOME_FILE" in os.environ else EXIT_INTERRUPTED)


def obey_parent_only(worker: int, signals: list[signal.Signals], then: Callable[[int], None] | None) -> None:
    """First act of a DataLoader worker: heed stop signals of its own process, and of nobody else.

    Slurm signals every process of a step. PyTorch's loader workers die of TERM, and the run with them; but their own
    process ends them by TERM too, and would wait for ever for one that ignores it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def listen() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    if then is not None:
        then(worker)


def end_with_launcher() -> None:
    """Let this process end when `accelerate launch`, which started it, is killed alone; first act of a training.

    Else it would train on, unseen, and beside the one that is started next. One process is asked to stop as by TERM, and
    killed where it has not saved within GRACE seconds; several have lost the launcher's store, through which they meet,
    and are killed at once: their last checkpoint is whole. Started without a launcher, by a shell, a training outlives it.
    Ctrl-C ends the launcher of one process, too: who pressed it waits for the checkpoint, however long it takes.
    """
    if not is_launched() or not sys.platform.startswith("linux"):
        return
    launcher, several = os.getppid(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if several else signal.SIGTERM)

    def kill_after_grace() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        if several:
            os.kill(os.getpid(), signal.SIGKILL)  # it was gone before the kernel was asked to tell
        time.sleep(GRACE)
        if not asked_by_person.is_set():
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill_after_grace, daemon=True).start()
