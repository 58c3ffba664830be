"""What training says of its steps: loss and accuracy of each batch, speed and memory of each log, the sums of the run.

Nothing that is looked at in a step may have to come from the GPU first: a batch's numbers are copied to the host beside
the next batch's computation, and read when they are there.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from finetuning import run_folder, tracking

SHOWN = ("loss", "eval_loss", "samples_per_second", "peak_memory_gib")  # of a log, in `progress.json`


@dataclass
class Watched:
    """What a training batch said of itself, on its way from the GPU to the host."""

    step: int
    rows: list[int] | None
    input_ids: torch.Tensor  # (rows, tokens)
    # Loss; sums over the batch: supervised tokens, their entropy, right ones; all real tokens. (5,), fp64.
    numbers: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None  # None on a CPU


class StepMetrics:
    """The numbers of training batches, in order, and the speed of an interval between two logs.

    `check_loss(loss, watched)` is called for each batch when its numbers have arrived, on a GPU one batch later.
    """

    def __init__(self, check_loss: Callable[[float, Watched], None]):
        self.check_loss = check_loss
        self._on_its_way: deque[Watched] = deque()
        self._arrived: list[list[float]] = []
        self.start_interval(num_tokens=0)

    def watch(self, step: int, rows: list[int] | None, input_ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """Take note of a batch: `numbers` as in `Watched`, fp64, of shape (5,), where the loss was computed."""
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._on_its_way.append(Watched(step, rows, input_ids, numbers, arrived))
        self.read_arrived()

    def read_arrived(self, *, wait: bool = False) -> None:
        """Look at all batches but the newest, which the GPU is still at; with `wait` at that too."""
        while self._on_its_way and (wait or len(self._on_its_way) > 1 or self._on_its_way[0].arrived is None):
            watched = self._on_its_way.popleft()
            if watched.arrived is not None:
                watched.arrived.synchronize()
            loss, *sums = watched.numbers.tolist()
            self.check_loss(loss, watched)
            self._arrived.append(sums)

    def forget_unfinished(self, input_ids: torch.Tensor) -> None:
        """Drop a batch that ran out of memory, and will be computed again."""
        if self._on_its_way and self._on_its_way[-1].input_ids is input_ids:
            self._on_its_way.pop()

    def gather(self, accelerator: Accelerator) -> torch.Tensor | None:
        """Sums of each batch since the last call, over all processes: (batches, 4), fp64; None where there are none."""
        self.read_arrived(wait=True)
        if not self._arrived:
            return None
        sums = torch.tensor(self._arrived, dtype=torch.float64, device=accelerator.device)
        self._arrived.clear()
        return accelerator.gather(sums).view(-1, *sums.shape).sum(0)

    def start_interval(self, num_tokens: int) -> None:
        """Begin to measure speed; `num_tokens` were trained on before."""
        self._started = time.perf_counter()
        self._num_tokens = num_tokens
        self.waited = 0.0  # seconds that this process waited for its next batch
        self.num_rows = 0  # of this process

    def leave_out(self, seconds: float) -> None:
        """Of the interval: what an evaluation took."""
        self._started += seconds

    def speed(self, accelerator: Accelerator, num_tokens: int) -> dict[str, float]:
        """Rows and tokens a second of all processes, share of data wait, GiB of memory; called by all processes."""
        seconds = time.perf_counter() - self._started
        logs = {
            "samples_per_second": round(self.num_rows * accelerator.num_processes / seconds, 3),
            "tokens_per_second": round((num_tokens - self._num_tokens) / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
        }
        if torch.cuda.is_available():
            mine = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device=accelerator.device)
            peaks = [round(peak, 2) for peak in accelerator.gather(mine).tolist()]
            logs["peak_memory_gib"] = max(peaks)
            if len(peaks) > 1:
                logs |= {f"peak_memory_gib/rank_{rank}": peak for rank, peak in enumerate(peaks)}
        return logs


class RunSums(TrainerCallback, ExportableState):
    """Sums over all attempts of a run, kept in each checkpoint's trainer_state.json.

    transformers counts what this process trains, TRL begins to count tokens at zero: a restarted run would report its
    last attempt as the whole.
    """

    def __init__(self):
        # Of the attempts before this one, up to the checkpoint that it continues:
        self.loss = 0.0  # over all steps, of each the mean over processes
        self.seconds = 0.0  # in training steps and evaluations
        self.num_tokens = 0
        self._noted: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Take the sums of the attempts before this one from the checkpoint."""
        self._began = time.time()

    def note(self, loss: float, num_tokens: int) -> None:
        """Before a checkpoint: the sum of the losses of this attempt's steps, and the tokens of the whole run."""
        seconds = self.seconds + time.time() - self._began
        self._noted = {"loss": self.loss + loss, "seconds": seconds, "num_tokens": num_tokens}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as transformers' stateful callbacks say it."""
        return {"args": {}, "attributes": self._noted}

    def continue_from(self, checkpoint: Path) -> None:
        """Take the sums of a checkpoint; of one that was written without them the tokens, which its log tells."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if kept := state.stateful_callbacks.get(type(self).__name__):
            vars(self).update(kept["attributes"])
        else:
            logged = (int(entry["num_tokens"]) for entry in reversed(state.log_history) if "num_tokens" in entry)
            self.num_tokens = next(logged, 0)


class ShowProgress(TrainerCallback):
    """Keeps `progress.json` up to date at every log; `headlines`: metric of the answers -> what to call it there."""

    def __init__(self, headlines: dict[str, str]):
        self.headlines = headlines

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock of the seconds a step takes."""
        self._began, self._from_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write step, losses, speed and scores to progress.json; main process only."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        known = run_folder.read_progress(folder)
        known |= {"step": state.global_step, "max_steps": state.max_steps, "logged_at": run_folder.now()}
        steps = state.global_step - self._from_step
        if steps:
            known["seconds_per_step"] = round((time.monotonic() - self._began) / steps, 4)
        known |= {name: logs[name] for name in SHOWN if name in logs}
        scores = {label: logs[f"eval_{name}"] for name, label in self.headlines.items() if f"eval_{name}" in logs}
        if scores:
            known["scores"] = known.get("scores", {}) | scores
        if address := tracking.wandb_address(args):
            known["wandb"] = address
        run_folder.write_progress(folder, known)
