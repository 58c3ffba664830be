"""How far is a training? Step, speed, time left, losses, checkpoints, restarts, the job in Slurm, the page in W&B.

    python scripts/status.py outputs/llava-lora
    python scripts/status.py outputs/*

Reads what the run writes into its folder, so it also answers on a login node while the run is on others. Whether it still
runs is asked of this machine where the run is on it, and of Slurm where it is a job. Of several names those that are no run
are passed over.
"""

import datetime
import itertools
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil

from finetuning import command
from finetuning.flags import Parser, nearest_path
from finetuning.preflight.planned_step import beside_plan
from finetuning.run_folder import PROGRESS, checkpoints, read_metrics, read_progress

SILENT = 900  # seconds without a log after which a run deserves a look
LIVE_JOBS = ("RUNNING", "PENDING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")  # of squeue(1)


def duration(seconds: float) -> str:
    """4000 -> 1 h 06 min"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def since(moment: str) -> float:
    """Seconds since a moment of progress.json."""
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(moment)).total_seconds()


def state_in_slurm(job: str) -> str | None:
    """`RUNNING on node[1-2]`, `PENDING (BeginTime)`; None without Slurm here or when it has forgotten the job."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %N %r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    if not answer:
        return None
    return f"{answer[0]} on {answer[1]}" if answer[0] == "RUNNING" else f"{answer[0]} ({answer[-1]})"


def is_alive(attempt: dict[str, Any]) -> bool | None:
    """Whether the process of an attempt runs on this machine; None for one of another machine, or of a job."""
    if attempt["host"] != socket.gethostname() or "job" in attempt:
        return None
    try:
        process = psutil.Process(attempt["process"])
        began = datetime.datetime.fromisoformat(attempt["started"]).timestamp()
        # A later process may have the number of one that has gone.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= began + 1
    except psutil.NoSuchProcess:
        return False


def describe(run: Path) -> str:
    """The state of one run, several lines. Raises ValueError for a folder that no training has written in."""
    progress = read_progress(run)
    if not progress:
        raise ValueError(
            f"{run}: no run here ({PROGRESS} is missing){nearest_path(run) or '.'} The folder is a recipe's output_dir"
        )
    completed = read_metrics(run).get("completed")
    attempts: list[dict[str, Any]] = progress["attempts"]
    last = attempts[-1]
    step, max_steps = progress.get("step", last["from_step"]), progress.get("max_steps")
    state, runs = ([], False) if completed else how_it_is(progress, last)
    lines = [str(run)]
    if completed:
        lines.append(f"  complete: {step:,} steps, ended {last['ended']}")
    elif max_steps is None:
        lines.append(f"  step: none logged yet, started {duration(since(last['started']))} ago on {last['host']}")
    else:
        left = (
            f", {duration((max_steps - step) * progress.get('seconds_per_step', 0))} left" if runs is not False else ""
        )
        unsure = " while it runs" if runs is None else ""
        lines.append(f"  step: {step:,} of {max_steps:,} ({step / max_steps:.0%}){left}{unsure}")
    if "seconds_per_step" in progress:
        rows = f", {progress['samples_per_second']:.1f} rows/s" if "samples_per_second" in progress else ""
        lines.append(f"  speed: {progress['seconds_per_step']:.2f} s a step{rows}")
    if planned := progress.get("planned"):
        rate = progress.get("samples_per_second")
        measured = {"seconds_per_step": planned["samples_per_step"] / rate} if rate else {}
        measured |= {name: progress[name] for name in ("peak_memory_gib",) if name in progress}
        lines.append(f"  {beside_plan(planned, measured)}")
    names = {"loss": "train", "eval_loss": "validation"}
    losses = [f"{label} {progress[name]:.4f}" for name, label in names.items() if name in progress]
    losses += [f"{label} {value:.4f}" for label, value in progress.get("scores", {}).items()]
    if losses:
        lines.append(f"  last losses: {', '.join(losses)}, logged {duration(since(progress['logged_at']))} ago")
    steps = list(checkpoints(run))
    lines.append(f"  last checkpoint: step {steps[-1]:,}" if steps else "  last checkpoint: none yet")
    if len(attempts) > 1:
        lines.append(f"  restarts: {len(attempts) - 1}")
        for before, attempt in itertools.pairwise(attempts):
            reason = before.get("reason", "ended without a word (killed?)")
            lines.append(f"    at step {attempt['from_step']:,}, {attempt['started']}: {reason}")
    lines += state
    if "wandb" in progress:
        lines.append(f"  W&B: {progress['wandb']}")
    return "\n".join(lines)


def how_it_is(progress: dict[str, Any], last: dict[str, Any]) -> tuple[list[str], bool | None]:
    """(what to say of an unfinished run, whether it runs): None where that cannot be known from here."""
    if "ended" in last:
        return [f"  stopped at step {last['step']:,} by {last['reason']}; the same command continues"], False
    lines, runs = [], is_alive(last)
    if "job" in last:
        state = state_in_slurm(last["job"])
        runs = state.startswith(LIVE_JOBS) if state else None
        lines.append(f"  job {last['job']}: {state or 'not known to Slurm here'}")
    if runs is False:
        whose = "its job" if "job" in last else f"its process {last['process']} on this machine"
        return [*lines, f"  not running: {whose} ended without a word (killed?); the same command continues"], False
    if runs and "job" not in last:
        lines.append(f"  running: process {last['process']} on this machine")
    silent = since(progress.get("logged_at", last["started"]))
    if silent > max(SILENT, 100 * progress.get("seconds_per_step", 0)):
        lines.append(f"  nothing was logged for {duration(silent)}: look at its output")
    return lines, runs


def main() -> None:
    """Print the state of each run; exit status 1 where one cannot be read."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="outputs/RUN")
    runs, problems, others = parser.parse_args().runs, [], []
    for run in runs:
        try:
            if len(runs) > 1 and run.exists() and not (run / PROGRESS).is_file():
                others.append(str(run))
            else:
                print(describe(run))
        except ValueError as error:
            problems.append(str(error))
    if others:
        print(f"Passed over, no runs: {', '.join(others)}")
    if problems:
        raise ValueError("\n".join(problems))


if __name__ == "__main__":
    command.run(main)
