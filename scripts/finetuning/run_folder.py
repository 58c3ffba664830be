"""How far a run is and how often it was started: `progress.json` in its folder, for status.py and for restarts.

    {"step", "max_steps", "logged_at", "seconds_per_step", "loss", ..., "attempts": [{"started", "from_step", "host",
     "process", "job", "restart", "nodes"; once it has ended in order: "ended", "step", "reason"}, ...]}

Standard library only: status.py answers at once. Only the main process writes.
"""

import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

FILE = "progress.json"


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a run's folder; empty where training has not begun."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    unfinished = folder / f"{FILE}.unfinished"
    unfinished.write_text(json.dumps(progress, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.rename(folder / FILE)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def this_job() -> dict[str, Any]:
    """Where this process runs: host and process, and job, restart and nodes under Slurm."""
    place: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
    if job := os.environ.get("SLURM_JOB_ID"):
        place |= {
            "job": job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        }
    return place


def refuse_futile_restart(folder: Path, from_step: int) -> None:
    """Raise ValueError when Slurm requeued this job twice and no step was gained: a third time would not gain one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_RESTART_COUNT" not in os.environ:
        return
    attempts = [attempt for attempt in read_progress(folder).get("attempts", []) if attempt.get("job") == job]
    if len(attempts) >= 2 and all(attempt["from_step"] == from_step for attempt in attempts[-2:]):
        ended = [attempt.get("reason", "killed without a word") for attempt in attempts[-2:]]
        raise ValueError(
            f"{folder}: job {job} began twice at step {from_step} and got no further ({'; then '.join(ended)}). Look at "
            "the job's log; if time ran out, save more often (save_steps), warn earlier (sbatch --signal=B:USR2@600) or "
            "ask for more time. Submit it anew to go on"
        )


def begin_attempt(folder: Path, from_step: int) -> None:
    progress = read_progress(folder) if from_step else {}
    attempts = read_progress(folder).get("attempts", [])
    progress["attempts"] = [*attempts, {"started": now(), "from_step": from_step, **this_job()}]
    write_progress(folder, progress)


def end_attempt(folder: Path, step: int, reason: str) -> None:
    progress = read_progress(folder)
    progress["step"] = step
    progress["attempts"][-1] |= {"ended": now(), "step": step, "reason": reason}
    write_progress(folder, progress)
