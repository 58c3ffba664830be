"""One line a log, of at most 100 columns."""

from types import SimpleNamespace

import pytest

from finetuning.training.log_lines import LogLines, short_duration, training_line

LOGS = {
    "loss": 0.66734, "learning_rate": 9.911e-4, "samples_per_second": 143.61, "peak_memory_gib": 131.2, "data_wait": 0.01,
    "entropy": 0.7,
}  # fmt: skip


def test_a_line_says_step_time_left_loss_score_speed_memory_and_rate():
    assert training_line(LOGS, 60, 544, 91.4, "off by 3.83 people") == (
        "step 60/544  1m 31s left  loss 0.6673  off by 3.83 people  143.6 samples/s  131.2 GiB  lr 0.00099"
    )


@pytest.mark.parametrize("seconds", [0.4, 59, 3600, 400_000])
def test_no_line_is_wider_than_a_hundred_columns(seconds):
    for score in ("", "off by 12.3 people", "answers that say the same as the reference 0.123"):
        line = training_line(LOGS, 123_456, 1_234_567, seconds, score)
        assert len(line) <= 100 and line.startswith("step 123,456/1,234,567") and score in line


def test_durations():
    assert [short_duration(seconds) for seconds in (0.4, 45, 725, 11_160)] == ["0s", "45s", "12m 05s", "3h 06m"]


def test_an_evaluation_is_one_line_with_its_score_which_the_next_lines_repeat(capsys):
    """The loss and the scored answers are logged one after the other."""
    lines = LogLines({"count_mae": "off by (people)"})
    args = SimpleNamespace(disable_tqdm=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=10)
    lines.on_train_begin(args, state, None)
    state.global_step = 5
    for logs in (
        {"eval_loss": 0.5713, "eval_runtime": 1.0},
        {"eval_count_mae": 3.83},
        {"loss": 0.6},
        {"train_loss": 0.6},
    ):
        lines.on_log(args, state, None, logs=logs)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "evaluated at step 5: validation loss 0.5713, off by 3.83 people"
    assert second.endswith("left  loss 0.6000  off by 3.83 people")
