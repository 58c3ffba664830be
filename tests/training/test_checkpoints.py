"""Checkpoints that are whole or absent."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from finetuning.training.checkpoints import checkpoint_problems, last_whole_checkpoint, put_in_place
from support.checkpoints import write_checkpoint


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
    assert f"Passed over, not whole: {tmp_path / 'checkpoint-12'}: trainer_state.json" in capsys.readouterr().out
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


NAMES = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state_0.pth",
    "rng_state_1.pth",
    "scheduler.pt",
    "trainer_state.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_cut_or_flipped_in_any_place_is_named_and_the_one_before_taken(tmp_path, name, capsys):
    for step in (4, 8):
        put_in_place(write_checkpoint(tmp_path / "unfinished", step), tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-8" / name
    whole = path.read_bytes()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    places = [int(share * (len(whole) - 1)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    flipped = [whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :] for place in places]
    for content in [*flipped, *(whole[:place] for place in places), None]:
        path.unlink() if content is None else path.write_bytes(content)
        capsys.readouterr()
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
        assert f"Passed over, not whole: {tmp_path / 'checkpoint-8'}: {name}: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_of_older_versions_lacks_no_kind_of_file(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path, 4)
    assert checkpoint_problems(checkpoint) == []
    (checkpoint / name).unlink()
    assert checkpoint_problems(checkpoint)


def test_a_damaged_manifest_is_no_checkpoint(tmp_path):
    put_in_place(write_checkpoint(tmp_path / "unfinished", 4), tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "manifest.json").write_text('{"files": {')
    with pytest.raises(ValueError, match=r"checkpoint-4: manifest\.json: "):
        last_whole_checkpoint(tmp_path)


def test_checkpoints_can_be_read_by_whom_the_umask_allows(tmp_path):
    unfinished = write_checkpoint(tmp_path / "unfinished", 4)
    (unfinished / "adapter_model.safetensors").chmod(0o600)
    before = os.umask(0o027)
    put_in_place(unfinished, tmp_path / "checkpoint-4")
    os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint-4").iterdir()}
    assert modes == {0o640}
