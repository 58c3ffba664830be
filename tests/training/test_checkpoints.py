"""Checkpoints that are whole or absent, stop signals, and restarts that lead nowhere."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetuning.training.checkpoints import StopRequest, checkpoint_problems, last_whole_checkpoint, put_in_place


def write_checkpoint(folder: Path, step: int) -> Path:
    """The files of a checkpoint of two processes, small."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.full((64, 64), float(step))}, checkpoint / "adapter_model.safetensors")
    torch.save({"state": torch.ones(500)}, checkpoint / "optimizer.pt")
    for rank in (0, 1):
        torch.save({"cpu": torch.random.get_rng_state()}, checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_whole_checkpoint_has_no_problems_and_a_broken_one_names_each(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 4)
    assert checkpoint_problems(checkpoint) == []
    cut(checkpoint / "adapter_model.safetensors")
    cut(checkpoint / "rng_state_1.pth")
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    problems = checkpoint_problems(checkpoint)
    assert len(problems) == 4
    assert "trainer_state.json is of step 3" in problems and "no state of the optimizer" in problems
    assert "rng_state_1.pth: cut off" in problems
    assert any(problem.startswith("adapter_model.safetensors: ") for problem in problems)
    assert len(checkpoint_problems(checkpoint, needs_optimizer=False)) == 3


def test_a_restart_takes_the_newest_whole_checkpoint_and_names_what_it_passed_over(tmp_path, capsys):
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    for step in (4, 8, 12):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path / "unfinished", 16)
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert f"Passed over, incomplete: {tmp_path / 'checkpoint-12'}: trainer_state.json" in capsys.readouterr().out
    for step in (4, 8):
        cut(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(ValueError, match="no checkpoint of this run can be continued") as raised:
        last_whole_checkpoint(tmp_path)
    assert all(f"checkpoint-{step}" in str(raised.value) for step in (4, 8, 12))


def test_a_checkpoint_that_cannot_be_read_back_is_not_put_in_place(tmp_path):
    old = write_checkpoint(tmp_path, 4)
    unfinished = write_checkpoint(tmp_path / "unfinished", 8)
    cut(unfinished / "optimizer.pt")
    with pytest.raises(OSError, match=r"cannot be read back: optimizer\.pt: cut off"):
        put_in_place(unfinished, tmp_path / "checkpoint-8")
    assert last_whole_checkpoint(tmp_path) == old and not (tmp_path / "checkpoint-8").exists()


def test_a_step_that_comes_again_takes_the_place_of_its_broken_checkpoint(tmp_path):
    (write_checkpoint(tmp_path, 8) / "trainer_state.json").unlink()
    put_in_place(write_checkpoint(tmp_path / "unfinished", 8), tmp_path / "checkpoint-8")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8" and not (tmp_path / "unfinished").exists()


@pytest.mark.slow
def test_killed_at_any_moment_every_checkpoint_in_place_is_whole(tmp_path):
    found_unfinished = 0
    for attempt in range(200):
        run = tmp_path / str(attempt)
        run.mkdir()
        child = os.fork()
        if child == 0:  # writes checkpoint after checkpoint until it is killed
            for step in range(1, 100_000):
                put_in_place(write_checkpoint(run / "unfinished", step), run / f"checkpoint-{step}")
        time.sleep(0.01 + 0.0007 * (attempt % 23))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found_unfinished += (run / "unfinished").exists()
        assert all(checkpoint_problems(path) == [] for path in run.glob("checkpoint-*"))
        shutil.rmtree(run)
        if found_unfinished == 5:
            break
    assert found_unfinished == 5  # the kill did come in the middle


def test_a_signal_is_remembered_here_and_not_in_a_forked_loader_worker(monkeypatch):
    monkeypatch.setenv("STOP_SIGNALS", "TERM,USR2")
    before = signal.getsignal(signal.SIGUSR2)
    with StopRequest() as request:
        assert not request.agree(torch.device("cpu"))
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(1 if request.received else 0)
        assert os.waitpid(child, 0)[1] == 0 and not request.received
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.agree(torch.device("cpu")) and request.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # left to others
    assert signal.getsignal(signal.SIGUSR2) == before


def test_an_unknown_stop_signal_is_refused(monkeypatch):
    monkeypatch.setenv("STOP_SIGNALS", "TERM,USR3")
    with pytest.raises(ValueError, match="no such signals: USR3"):
        StopRequest()
