"""A run keeps its best checkpoint by the answers' score, says so, and stops early; interrupted and moved, too."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetuning.tasks.exam import Exam
from support.training import train

# Scores of the four evaluations, at steps 1 to 4: the second is the best.
SCORES = [0.1, 0.7, 0.2, 0.3]
FLAGS = (
    *("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"),
    *("--eval_answers", "2", "--eval_max_new_tokens", "2", "--learning_rate", "0.01"),
)


@pytest.fixture
def planted(monkeypatch):
    """Evaluations whose answers score as `SCORES` say, by the step; the rest of each evaluation is as it is."""
    score, steps = Exam.score, []

    def planted_score(exam, answers):
        metrics, table = score(exam, answers)
        steps.append(len(steps))
        return metrics | {"score": SCORES[len(steps) - 1]}, table

    monkeypatch.setattr(Exam, "score", planted_score)
    return steps


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(first, second):
    assert all(torch.equal(tensor, weights(second)[key]) for key, tensor in weights(first).items())


def test_the_best_checkpoint_is_kept_and_named_and_survives_rotation(
    planted, tiny_llava, cctv_dataset, tmp_path, capsys
):
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *FLAGS, "--save_total_limit", "3")
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["kept_step"], metrics["global_step"], metrics["eval_score"]) == (2, 4, 0.7)
    assert "Kept step 2 of 4, the best by eval_score (0.7000)" in capsys.readouterr().out
    # Of the first three the worst is gone, not the best.
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    assert_same(run, run / "checkpoint-2")
    assert not torch.equal(next(iter(weights(run).values())), next(iter(weights(run / "checkpoint-4").values())))

    # The same run, stopped after step 3 and moved: the best is found in its new place.
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, moved)
    for path in [moved / "metrics.json", moved / "trainer_state.json", *moved.glob("*.safetensors")]:
        path.unlink()
    shutil.rmtree(moved / "checkpoint-4")
    planted[:] = [0, 1, 2]
    shutil.rmtree(run)
    train(tiny_llava, cctv_dataset, moved, *FLAGS, "--save_total_limit", "2")
    metrics = json.loads((moved / "metrics.json").read_text())
    assert (metrics["kept_step"], metrics["eval_score"]) == (2, 0.7)
    assert_same(moved, moved / "checkpoint-2")
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_training_stops_early_by_the_answers_score(planted, tiny_llava, cctv_dataset, tmp_path, capsys):
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *FLAGS, "--early_stopping_patience", "1")
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["kept_step"], metrics["global_step"], metrics["completed"]) == (2, 3, True)
    assert "Stopping early at step 3: 1 evaluations without a better eval_score" in capsys.readouterr().out
    # Killed before it could write its end, it stays where it stopped.
    end = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    train(tiny_llava, cctv_dataset, run, *FLAGS, "--early_stopping_patience", "1")
    assert json.loads((run / "metrics.json").read_text())["global_step"] == end["global_step"] == 3


def test_without_evaluations_or_answers_it_is_said_what_is_kept(tiny_llava, cctv_dataset, tmp_path, capsys):
    run = train(tiny_llava, cctv_dataset, tmp_path / "none", "--max_steps", "1")
    assert "evaluates nothing while it trains: its last weights are kept" in capsys.readouterr().out
    assert "kept_step" not in json.loads((run / "metrics.json").read_text())
    flags = (*FLAGS, "--eval_answers", "0", "--max_steps", "2")
    run = train(tiny_llava, cctv_dataset, tmp_path / "loss", *flags)
    assert "the best checkpoint is the one with the lowest eval_loss" in capsys.readouterr().out
    losses = {
        e["step"]: e["eval_loss"]
        for e in json.loads((run / "trainer_state.json").read_text())["log_history"]
        if "eval_loss" in e
    }
    assert json.loads((run / "metrics.json").read_text())["kept_step"] == min(losses, key=losses.get)
    with pytest.raises(ValueError, match="early_stopping_patience: 2 stops when the best checkpoint is that old"):
        train(tiny_llava, cctv_dataset, tmp_path / "early", "--early_stopping_patience", "2")
