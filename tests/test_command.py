"""How commands end: one sentence, no stack trace, and no warning that nobody can act on."""

import inspect
import os
import signal
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT

from finetuning import command
from finetuning.known_warnings import LOGGED, WARNED

SLEEPER = """
from finetuning import command
import sys, time
def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)
command.run(main)
"""


READER = """
import multiprocessing, os, signal, sys, time
from finetuning import command
def read(parent):
    while os.getppid() == parent and "killed" in sys.argv:
        time.sleep(0.01)
    sys.excepthook(ConnectionResetError, ConnectionResetError("reset by peer"), None)
process = multiprocessing.get_context("fork").Process(target=read, args=(os.getpid(),))
process.start()
if "killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
process.join()
"""


def start(**environment: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_one_sentence_and_what_was_begun_is_tidied_up(number):
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out == "tidied\n" and err.strip() == f"-c: {command.STOPPED}"


def test_a_stop_that_falls_into_a_destructor_is_not_lost():
    """Python drops what is raised there, and says so with a trace: the library's weak references did so while loading."""
    pressing = """
import os, signal, time
from finetuning import command
class Kept:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
def main():
    Kept()
    time.sleep(60)
command.run(main)
"""
    result = subprocess.run(
        [sys.executable, "-c", pressing], env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 130 and result.stderr.strip() == f"-c: {command.STOPPED}"


def test_only_the_first_of_several_processes_speaks_of_a_stop():
    process = start(RANK="1", WORLD_SIZE="2")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""


def test_the_sentence_comes_again_behind_the_launchers_own_trace(tmp_path):
    """As `accelerate launch` does: a parent that prints a trace when its process has failed."""
    failing = "from finetuning import command\ndef main(): raise ValueError('no such thing')\ncommand.run(main)"
    launcher = f"import subprocess, sys; code = subprocess.call([sys.executable, '-c', {failing!r}]); sys.exit('TRACE')"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts"), "ACCELERATE_MIXED_PRECISION": "no"}
    environment.pop("SLURM_JOB_ID", None)
    said = []
    for name in ("accelerate", "make"):
        (tmp_path / name).write_text(launcher)
        result = subprocess.run(
            [sys.executable, tmp_path / name], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        said.append(result.stderr.split())
    again, once = said
    assert once == ["-c:", "no", "such", "thing", "TRACE"]  # no launcher, though the environment is one's
    assert again == ["-c:", "no", "such", "thing", "TRACE", "-c:", "no", "such", "thing"]


@pytest.mark.parametrize("flag", [["--num_processes", "2"], ["--num-processes=2"]])
def test_a_launch_that_loses_its_processes_is_refused(monkeypatch, flag):
    words = ["python", "accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", *flag, "scripts/x.py"]
    monkeypatch.setattr(command, "launch_words", lambda: words)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"--num_processes 2, but .* starts one process"):
        command.refuse_lost_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    command.refuse_lost_processes()


@pytest.mark.parametrize("known", [*WARNED, *LOGGED.values()], ids=lambda known: known.module)
def test_the_installed_libraries_have_the_words_of_each_silenced_warning(known):
    assert known.words in inspect.getsource(import_module(known.module))
    assert known.reason


@pytest.mark.slow
def test_a_reader_whose_command_was_killed_prints_no_trace_and_any_other_does():
    for word in ("killed", "alive"):
        ended = subprocess.run(
            [sys.executable, "-c", READER, word], cwd=ROOT / "scripts", capture_output=True, text=True, check=False
        )
        assert ("reset by peer" in ended.stderr) == (word == "alive"), ended.stderr
