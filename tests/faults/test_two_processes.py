"""Kills, stops and damaged checkpoints of two processes with the shipped files of `accelerate launch`. In make test-faults only."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from finetuning.manifest import MANIFEST
from finetuning.run_folder import METRICS, read_progress
from finetuning.training.checkpoints import last_whole_checkpoint
from support.cases_of_faults import train_words
from support.damage import all_files, damaged, damages
from support.fork_server import Commands, Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("FAULTS") != "whole", reason="launches of minutes: make test-faults"),
]
STRATEGIES = ["ddp", "deepspeed_zero2", "fsdp2"]
KILLS = 10  # of each strategy
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    """The server of commands; each launch takes its time to train, not to import."""
    server = Commands(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(request, commands, tiny_llava, cctv_dataset, tmp_path_factory):
    """(words of a launch by two processes for a run's folder, its finished run, seconds that it took)."""

    def words(run: Path, **flags: object) -> list[str | Path]:
        training = train_words("llava", tiny_llava, cctv_dataset, run, global_batch_size=4, **flags)
        launch = ["--config_file", f"accelerate_configs/{request.param}.yaml", "--num_processes", "2"]
        return ["tests/support/forked_launch.py", *launch, *training]

    run, started = tmp_path_factory.mktemp(request.param) / "run", time.monotonic()
    result = commands.run(*words(run, save_total_limit=3))
    assert result.code == 0, result.log
    return words, run, time.monotonic() - started


def processes_of(job: Job) -> list[psutil.Process]:
    """The training's processes, in the order of their ranks."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(job.process).children()
    return []


def test_killed_at_random_moments_it_goes_on(commands, trained, tmp_path):
    words, finished, seconds = trained
    run, draw = tmp_path / "run", random.Random(finished.parent.name.rstrip("0123456789"))
    killed = 0
    for number in range(KILLS):
        job = commands.start(*words(run))
        time.sleep(draw.uniform(0.5, seconds))
        ranks = processes_of(job)
        if number % 3 == 0 or not ranks:
            job.kill()  # the launcher alone
        elif number % 3 == 1:
            ranks[number % 2].kill()
        else:
            job.kill(workers_too=True)
        result = job.wait()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive, result.log
        killed += result.code != 0
        if result.code == 0:
            assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
            shutil.rmtree(run)
    result = commands.run(*words(run))
    assert result.code == 0, result.log
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    print(f"{finished.parent.name}: killed {killed} times of {KILLS}")


def test_a_stopped_training_goes_on(commands, trained, tmp_path):
    words, finished, _ = trained
    run = tmp_path / "run"
    job = commands.start(*words(run, save_strategy="no"))
    deadline = time.monotonic() + 300
    while read_progress(run).get("step", 0) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes_of(job):
        process.send_signal(signal.SIGTERM)
    result = job.wait()
    assert result.code != 0 and "Traceback" not in result.log, result.log
    result = commands.run(*words(run, save_strategy="no"))
    assert result.code == 0, result.log
    first, second = read_progress(run)["attempts"]
    assert first["reason"] == "SIGTERM" and second["from_step"] == first["step"]
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_each_damaged_file_of_a_checkpoint_is_named_and_the_one_before_is_taken(trained, capsys):
    _, run, _ = trained
    newest, before = run / "checkpoint-4", run / "checkpoint-3"
    assert last_whole_checkpoint(run) == newest
    for path in all_files(newest):
        for what, contents in damages(path):
            if (path.name, contents) == (MANIFEST, None):  # as an older version left it
                continue
            with damaged(path, contents):
                found = last_whole_checkpoint(run)
            name = str(path.relative_to(newest))
            assert found == before and f"{newest}: {name}" in capsys.readouterr().out, (name, what)


def test_a_cut_or_missing_file_of_a_checkpoint_is_passed_over(commands, trained, tmp_path):
    words, finished, _ = trained
    run = shutil.copytree(finished, tmp_path / "run")
    (run / METRICS).unlink()
    (run / WEIGHTS).write_bytes(b"half")
    largest = max(all_files(run / "checkpoint-4"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    result = commands.run(*words(run, save_total_limit=3))
    assert result.code == 0, result.log
    assert f"{run / 'checkpoint-4'}: {largest.relative_to(run / 'checkpoint-4')}" in result.log
    assert f"{run / 'checkpoint-3'}: trainer_state.json: missing" in result.log
    assert f"Continuing from {run / 'checkpoint-2'}" in result.log
    assert (run / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
