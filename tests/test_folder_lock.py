"""Who holds a lock, who is refused, and whose lock is taken over."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import ROOT

from finetuning import folder_lock
from finetuning.folder_lock import give_back, lock_file, one_at_a_time, take_lock
from support.locks import held_by_another


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock on tmp_path / "run"."""
    with held_by_another(tmp_path / "run") as process:
        yield process


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    message = (
        f"run: a training by process {holder.pid} on {socket.gethostname()} is writing here. Wait until it has ended"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        take_lock(tmp_path / "run", "a training")


def test_a_killed_process_leaves_no_lock_behind(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert lock_file(tmp_path / "run").is_file()
    began = time.monotonic()
    with one_at_a_time(tmp_path / "run", "a training"):
        assert lock_file(tmp_path / "run").read_text().split()[0] == str(os.getpid())
    assert time.monotonic() - began < 2 and not lock_file(tmp_path / "run").exists()


def test_a_lock_of_another_host_stays_unless_its_owner_is_known_to_have_ended(tmp_path):
    file = lock_file(tmp_path / "run")
    file.write_text("4711\nnode7\n1\n")
    with pytest.raises(ValueError, match=r"process 4711 on node7 .* if that machine is down, delete .*\.run\.lock"):
        take_lock(tmp_path / "run", "a training")
    take_lock(tmp_path / "run", "a training", owner_has_ended=True)
    give_back(tmp_path / "run")


def test_the_same_process_may_begin_again(tmp_path):
    take_lock(tmp_path / "run", "a training")
    take_lock(tmp_path / "run", "a training")
    give_back(tmp_path / "run")
    assert not lock_file(tmp_path / "run").exists()


def test_a_lock_that_was_never_finished_does_not_block_for_ever(tmp_path, monkeypatch):
    lock_file(tmp_path / "run").touch()
    with pytest.raises(ValueError, match="a training by another process is writing here"):
        take_lock(tmp_path / "run", "a training")
    monkeypatch.setattr(folder_lock, "HALF_MADE", 0.0)
    take_lock(tmp_path / "run", "a training")
    give_back(tmp_path / "run")


def test_the_lock_lies_beside_what_it_locks_and_is_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        lock_file(Path("outputs/run")) == lock_file(tmp_path / "outputs" / "run") == tmp_path / "outputs" / ".run.lock"
    )
    assert lock_file(ROOT / "answers.jsonl").name == ".answers.jsonl.lock"
