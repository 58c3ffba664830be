"""What a training says on the screen: one line a log, of at most 100 columns, and a bar where a terminal shows it.

Everything else that is logged goes to the trackers, and stays in trainer_state.json.
"""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm
from transformers import TrainerCallback

from finetuning import start

WIDEST = 100  # columns


def short_duration(seconds: float) -> str:
    """`45s`, `12m 05s`, `3h 06m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def named(label: str, value: float) -> str:
    """`off by (people)`, 3.83 -> `off by 3.83 people`."""
    name, _, unit = label.partition(" (")
    return f"{name} {value:.3g} {unit.rstrip(')')}".rstrip()


def training_line(logs: Mapping[str, float], step: int, max_steps: int, seconds_left: float, score: str) -> str:
    """Step, time left, loss, the last score, learning rate, speed and memory; what is not known is left out.

    From the end on parts are dropped that would not fit into 100 columns.
    """
    parts = [
        f"step {step:,}/{max_steps:,}",
        f"{short_duration(seconds_left)} left",
        f"loss {logs['loss']:.4f}",
        score,
        f"{logs['samples_per_second']:.1f} samples/s" if "samples_per_second" in logs else "",
        f"{logs['peak_memory_gib']:.1f} GiB" if "peak_memory_gib" in logs else "",
        f"lr {logs['learning_rate']:.2g}" if "learning_rate" in logs else "",
    ]
    parts = [part for part in parts if part]
    while len(line := "  ".join(parts)) > WIDEST:
        parts.pop()
    return line


class LogLines(TrainerCallback):
    """In place of transformers' ProgressCallback and PrinterCallback; `headlines`: metric of the answers -> its label."""

    def __init__(self, headlines: Mapping[str, str]):
        self.headlines = headlines
        self.score, self._evaluated = "", {}
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._from_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        start.ended("first step")
        if state.is_world_process_zero and (said := start.told()):
            self.say(said)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            steps = state.global_step - self._from_step
            seconds = (time.monotonic() - self._began) / max(steps, 1) * (state.max_steps - state.global_step)
            self.say(training_line(logs, state.global_step, state.max_steps, seconds, self.score))
        self._evaluated |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        scores = {label: logs[f"eval_{name}"] for name, label in self.headlines.items() if f"eval_{name}" in logs}
        if scores:
            self.score = named(*next(iter(scores.items())))
        # The loss is logged first, then the scored answers: among them no headline where not one answer could be read.
        if self._evaluated and ("eval_loss" not in logs or not self.headlines) and "loss" not in logs:
            said = [f"validation loss {self._evaluated['eval_loss']:.4f}"] if "eval_loss" in self._evaluated else []
            said += [named(label, value) for label, value in scores.items()]
            self.say(f"evaluated at step {state.global_step:,}: {', '.join(said)}")
            self._evaluated = {}

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line) if self.bar is not None else print(line, flush=True)
