"""Two commands that would write the same: the second is refused in one sentence, whatever it is."""

from contextlib import ExitStack

import pytest
from conftest import run_here

from finetuning.folder_lock import give_back, lock_file, lock_inside
from finetuning.run_folder import write_metrics
from preparing.dataset_writer import refuse_existing_output, scratch_prefix
from support.locks import held_by_another
from support.training import SAMPLE


@pytest.fixture
def rival():
    """`rival(path)`: another process that writes there; its id."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(held_by_another(path)).pid


def test_a_second_training_merge_or_generate_is_refused_and_nothing_is_written(
    rival, tiny_llava, cctv_dataset, tmp_path
):
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "adapter_model.safetensors").touch()
    (finished / "arguments.yaml").write_text("model_revision: main\n")
    write_metrics(finished, {"completed": True})
    commands = {
        "a training": ("run", "scripts/train_llava.py", "--config", SAMPLE, "--model_name_or_path", tiny_llava,
                       "--dataset_name", cctv_dataset, "--output_dir", tmp_path / "run"),
        "a merge": ("merged", "scripts/merge_adapter.py", "--run", finished, "--output", tmp_path / "merged"),
        "a generate.py": ("answers.jsonl", "scripts/generate.py", "--model", tiny_llava, "--question", "How many?",
                          "--output", tmp_path / "answers.jsonl"),
    }  # fmt: skip
    for what, (name, *words) in commands.items():
        process = rival(tmp_path / name)
        result = run_here(*words)
        assert result.returncode == 1 and f"{tmp_path / name}: {what} by process {process} on " in result.stderr
        assert not (tmp_path / name).exists() and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_second_preparation_is_refused_and_what_a_killed_one_left_is_removed(rival, tmp_path):
    output, other = tmp_path / "out", tmp_path / ".out-of-the-way"
    process = rival(output)
    with pytest.raises(ValueError, match=f"a preparation by process {process} on "):
        refuse_existing_output(output)
    left = tmp_path / f"{scratch_prefix(output)}x1y2"
    for folder in (left / "cache", other):
        folder.mkdir(parents=True)
    lock_file(output).unlink()
    refuse_existing_output(output)
    assert not left.exists() and other.exists() and lock_file(output).is_file()
    give_back(output)


@pytest.mark.slow
def test_a_complete_run_is_not_moved_away_from_an_evaluation(rival, tmp_path):
    run = tmp_path / "run"
    process = rival(run / "evaluation" / "test")
    assert f"by process {process} on " in lock_inside(run)
    (run / "evaluation" / ".test.lock").unlink()
    assert lock_inside(run) is None
