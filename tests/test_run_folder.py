"""What a run's folder keeps: whole or absent, read again when damaged, found again from anywhere."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import run_command

from finetuning import run_folder
from finetuning.run_folder import EvaluationFolder

ARGUMENTS = {"dataset_name": "data/cctv", "learning_rate": 1e-4, "model_name_or_path": "models/tiny", "text": "말"}


def write_checkpoint(run: Path, step: int) -> Path:
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    run_folder.copy_into_checkpoint(run, checkpoint)
    return checkpoint


@pytest.mark.slow
def test_a_file_is_replaced_whole_or_stays_when_the_writer_is_killed(tmp_path):
    sizes = set()
    for attempt in range(100):
        child = os.fork()
        if child == 0:
            while True:
                run_folder.write_progress(tmp_path, {"attempts": ["x" * 50_000] * (1 + time.monotonic_ns() % 7)})
        time.sleep(0.01 + 0.0007 * (attempt % 11))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sizes.add(len(run_folder.read_progress(tmp_path).get("attempts", [])))  # it can be read
        if attempt > 9 and len(sizes - {0}) > 2:
            break
    assert len(sizes - {0}) > 2  # the kills came at different moments


def test_arguments_come_back_as_they_were_and_as_a_recipe(tmp_path):
    run_folder.write_arguments(tmp_path, ARGUMENTS)
    assert run_folder.read_arguments(tmp_path) == yaml.safe_load((tmp_path / "arguments.yaml").read_text()) == ARGUMENTS
    assert run_folder.read_arguments(tmp_path / "checkpoint-4") == ARGUMENTS
    assert run_folder.read_arguments(tmp_path / "elsewhere" / "run") is None
    run_folder.change_arguments(tmp_path, checkpoint_layers="3")
    assert run_folder.read_arguments(tmp_path) == ARGUMENTS | {"checkpoint_layers": "3"}


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_damaged_arguments_are_read_from_a_checkpoint_or_named(tmp_path, capsys, keep):
    run_folder.write_arguments(tmp_path, ARGUMENTS)
    whole = (tmp_path / "arguments.yaml").read_bytes()
    (tmp_path / "arguments.yaml").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"arguments\.yaml: damaged .*no checkpoint has a copy\. Delete this file"):
        run_folder.read_arguments(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "arguments.yaml").write_bytes(whole)
    write_checkpoint(tmp_path, 4)  # whose copy is damaged too
    assert run_folder.read_arguments(tmp_path) == ARGUMENTS
    assert "arguments.yaml: damaged" in (told := capsys.readouterr().err) and "checkpoint-2" in told


@pytest.mark.parametrize("text", ["", '{"attempts": [{"started"', "[]"])
def test_damaged_progress_is_read_from_a_checkpoint_or_named(tmp_path, text):
    run_folder.begin_attempt(tmp_path, 0)
    write_checkpoint(tmp_path, 4)
    (tmp_path / "progress.json").write_text(text)
    assert run_folder.read_progress(tmp_path)["attempts"][0]["from_step"] == 0
    result = run_command("scripts/status.py", tmp_path)
    assert result.returncode == 0 and "last checkpoint: step 4" in result.stdout
    shutil.rmtree(tmp_path / "checkpoint-4")
    result = run_command("scripts/status.py", tmp_path)
    assert result.returncode == 1 and "progress.json: damaged" in result.stderr and "Traceback" not in result.stderr


def test_damaged_metrics_are_told_again_by_the_log_of_the_run(tmp_path):
    history = [
        {"step": 4, "eval_loss": 2.0},
        {"step": 8, "loss": 0.4},
        {"step": 8, "eval_loss": 1.5},
        {"step": 8, "train_loss": 0.5, "train_runtime": 9.0},
    ]
    metrics = run_folder.final_metrics(history, 8)
    assert metrics == {
        "train_loss": 0.5, "train_runtime": 9.0, "eval_loss": 1.5, "global_step": 8, "completed": True
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text('{"train_loss": 0.')
    with pytest.raises(ValueError, match=r"metrics\.json: damaged .* continues from its last checkpoint"):
        run_folder.read_metrics(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 8, "log_history": history}))
    assert run_folder.read_metrics(tmp_path) == metrics


def test_a_base_and_a_dataset_are_found_from_any_directory_and_after_a_move(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in ("models/tiny", "data/cctv", "outputs/run", "elsewhere/models/tiny"):
        (project / name).mkdir(parents=True)
    run = project / "outputs" / "run"
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/tiny"}))
    monkeypatch.chdir(project)
    run_folder.write_arguments(run, ARGUMENTS)
    run_folder.write_begun_with(Path("outputs/run"))
    assert (
        run_folder.adapter_base(run) == run_folder.untuned_model(run) == "models/tiny"
    )  # as it was given, where it fits
    assert run_folder.find_again(run, "google/gemma-2b") == "google/gemma-2b"
    monkeypatch.chdir(project / "elsewhere")  # which has another model of this name
    assert run_folder.adapter_base(run) == str(project / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert run_folder.adapter_base(write_checkpoint(run, 4)) is None
    moved = project.rename(tmp_path / "moved")
    assert run_folder.adapter_base(moved / "outputs" / "run") == str(moved / "models" / "tiny")
    assert run_folder.find_again(moved / "outputs" / "run", "data/cctv") == str(moved / "data" / "cctv")
    shutil.move(moved / "outputs", tmp_path / "archive")  # alone: the models stayed
    (tmp_path / "moved").rename(project)
    assert run_folder.adapter_base(tmp_path / "archive" / "run") == str(project / "models" / "tiny")


def test_an_adapter_that_names_no_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("")
    with pytest.raises(ValueError, match=r"adapter_config\.json: damaged \(empty\)"):
        run_folder.adapter_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        run_folder.adapter_base(tmp_path)


def test_only_a_completed_run_opens(tmp_path):
    with pytest.raises(ValueError, match="no run here"):
        run_folder.open_run(str(tmp_path))
    run_folder.write_arguments(tmp_path, ARGUMENTS)
    with pytest.raises(ValueError, match="training has not ended here"):
        run_folder.open_run(str(tmp_path))
    run_folder.write_metrics(tmp_path, {"completed": True})
    assert run_folder.open_run(str(tmp_path)) == (tmp_path, ARGUMENTS)
    (tmp_path / "arguments.yaml").write_text("")
    with pytest.raises(ValueError, match=r"arguments\.yaml: damaged \(empty\)"):
        run_folder.open_run(str(tmp_path))


def test_a_folder_set_aside_takes_the_first_free_number(tmp_path):
    for _ in range(2):
        (tmp_path / "run").mkdir()
        run_folder.set_aside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.previous-1", "run.previous-2"]


def test_an_evaluation_keeps_answers_by_row_and_refuses_a_row_that_came_twice(tmp_path):
    evaluation = EvaluationFolder(tmp_path, "test")
    assert evaluation.settings() is None
    evaluation.begin({"limit": 3})
    evaluation.keep("tuned", 0, ["one", "둘"])
    evaluation.keep("tuned", 2, ["three"])
    evaluation.keep("base", 0, ["eins"])
    assert evaluation.kept(["base", "tuned"]) == {"base": ["eins"], "tuned": ["one", "둘", "three"]}
    assert evaluation.settings() == {"limit": 3} and evaluation.metrics() == {}
    evaluation.keep("base", 0, ["eins"])
    with pytest.raises(ValueError, match="expected the base model's answer to row 1, found row 0: two evaluations"):
        evaluation.kept(["base", "tuned"])
    evaluation.finish({"settings": {"limit": 3}}, [{"row": 0}], "a table")
    assert {path.name for path in evaluation.folder.iterdir()} == {"answers.jsonl", "metrics.json", "table.md"}
    assert evaluation.settings() == {"limit": 3} and run_folder.evaluations(tmp_path) == [evaluation.metrics_file]


def test_wandb_s_id_is_one_for_all_attempts_also_after_an_empty_file(tmp_path):
    (tmp_path / "wandb_run_id.txt").touch()
    assert [run_folder.wandb_id(tmp_path, new) for new in ("first", "second")] == ["first", "first"]
