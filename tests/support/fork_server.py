"""Commands of the project in forked processes: all is imported once, and each command then starts at once.

`Commands` is the test's side: `run(words)` and `start(words)`. The server's side, this file as a program, reads a job a
line from its standard input: {"words", "environment", "log"}. It forks, answers with the child's id, waits for its end and
answers with its code. The child leads a session of its own, so that it can be killed with its workers or alone.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch, datasets, transformers, trl, peft, PIL.Image, scipy.stats, matplotlib.pyplot, wandb, train_llava, check_data, "
    "prepare_cctv, finetuning.tasks.evaluate, finetuning.export.merge_run, finetuning.inference.session, "
    "finetuning.inference.count_file, finetuning.models.loading"
)


@dataclass
class Result:
    """How a command ended: `code` is negative for a signal; `log` is what it printed and complained."""

    code: int
    log: str


class Job:
    """A command that runs; `process` is its id."""

    def __init__(self, commands: "Commands", process: int, log: Path):
        self.commands, self.process, self.log = commands, process, log

    def kill(self, *, workers_too: bool = False) -> None:
        """SIGKILL for the command alone, or for its session."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            (os.killpg if workers_too else os.kill)(self.process, signal.SIGKILL)

    def press_ctrl_c(self) -> None:
        """SIGINT for the session, as a terminal sends it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGINT)

    def wait(self) -> Result:
        """The end of the command."""
        code, self.commands.running = self.commands.answer()["code"], None
        return Result(code, self.log.read_text(encoding="utf-8", errors="replace"))


class Commands:
    """The server as a process of its own; one command at a time."""

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.number = folder, 0
        self.running: Job | None = None
        path = os.pathsep.join(str(ROOT / name) for name in ("scripts", "data_prep", "tests"))
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
        )
        assert self.answer() == {"ready": True}

    def answer(self) -> dict:
        line = self.server.stdout.readline()
        assert line, "the server of commands has ended"
        return json.loads(line)

    def start(self, *words: str | Path, **environment: str) -> Job:
        """Begin a command, such as `scripts/generate.py`, with its flags."""
        if self.running is not None:  # of a test that failed before it waited
            self.running.kill(workers_too=True)
            self.running.wait()
        self.number += 1
        log = self.folder / f"{self.number:03}.log"
        job = {"words": [str(word) for word in words], "environment": environment, "log": str(log)}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.running = Job(self, self.answer()["process"], log)
        return self.running

    def run(self, *words: str | Path, **environment: str) -> Result:
        """A command from its start to its end."""
        return self.start(*words, **environment).wait()

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(timeout=60)


def run_as_main(words: list[str], environment: dict[str, str], log: str) -> int:
    """In the child: the command with its output in `log`. Its exit code, as Python's own end would give it."""
    os.setsid()
    os.environ |= environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = words
    import atexit
    import traceback

    code: object = None
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:  # what Python itself would print
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def serve() -> None:
    """Fork for each job that comes."""
    exec(f"import {IMPORTED}", {})
    answers = os.dup(1)  # libraries may print
    os.dup2(2, 1)
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run_as_main(**json.loads(line))
            finally:
                os._exit(code)
        os.write(answers, json.dumps({"process": child}).encode() + b"\n")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, json.dumps({"code": code}).encode() + b"\n")


if __name__ == "__main__":
    serve()
