"""One training in three attempts, told to W&B (offline) and TensorBoard: what each can be read back to say."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.wandb_files import read_attempts

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_secretsecretsecretsecretsecret"}


def start(model: Path, dataset: Path, output: Path, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "scripts/train_llava.py", "--config", "scripts/configs/llava_sample.yaml"]
    command += ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output, "--max_steps", "12"]
    command += ["--per_device_train_batch_size", "2", "--lora_dropout", "0.1", "--logging_steps", "2"]
    command += ["--eval_strategy", "steps", "--eval_steps", "6", "--eval_answers", "4"]
    command += ["--save_strategy", "steps", "--save_steps", "100", "--save_total_limit", "2", *flags]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command_lines(process: int) -> str:
    """What `ps` shows of a process and of those that it has started, W&B's among them."""
    family = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    return "".join(f"{' '.join(member.cmdline())}\n" for member in family)


def step_of(run: Path) -> int:
    path = run / "progress.json"
    return json.loads(path.read_text()).get("step", 0) if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(tiny_llava, cctv_dataset, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start(tiny_llava, cctv_dataset, run, WANDB_MODE="disabled")
    assert process.wait() == 0, process.stdout.read()
    return run


@pytest.fixture(scope="module")
def interrupted(tiny_llava, cctv_dataset, tmp_path_factory) -> tuple[Path, list[int], str]:
    """A run whose first two attempts are told to stop: (folder, exit codes, all that was printed and that `ps` showed).

    Two loader workers, which get the signals too, as from Slurm and from a terminal.
    """
    run = tmp_path_factory.mktemp("interrupted") / "run"
    codes, printed = [], ""
    for number, after in ((signal.SIGTERM, 2), (signal.SIGINT, 6), (None, None)):
        flags = ("--dataloader_num_workers", "2", "--log_adapter", "true")
        process = start(tiny_llava, cctv_dataset, run, *flags, WANDB_MODE="offline", **SECRETS)
        while number is not None and step_of(run) < after:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        printed += command_lines(process.pid)
        if number is not None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in [process.pid, *map(int, children)]:
                os.kill(child, number)
        printed += process.communicate()[0]
        codes.append(process.returncode)
    return run, codes, printed


def test_three_attempts_end_bit_for_bit_where_one_ends(whole, interrupted):
    run, codes, printed = interrupted
    assert codes == [75, 75, 0], printed
    expected, found = load_file(whole / "adapter_model.safetensors"), load_file(run / "adapter_model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    attempts = json.loads((run / "progress.json").read_text())["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["SIGTERM", "Ctrl-C", "completed"]
    # Not one step is done twice: each attempt begins where the one before it stopped.
    assert [attempt["from_step"] for attempt in attempts] == [0, attempts[0]["step"], attempts[1]["step"]]
    assert attempts[2]["step"] == 12 and not (run / "unfinished").exists()
    assert len(list(run.glob("checkpoint-*"))) == 2  # save_total_limit


def test_the_three_attempts_are_one_curve(whole, interrupted):
    one, three = (
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, interrupted[0])
    )
    final, again = ([entry for entry in history if "loss" in entry][-1] for history in (one, three))
    assert (final["loss"], final["learning_rate"], final["num_tokens"]) == (
        again["loss"], again["learning_rate"], again["num_tokens"])  # fmt: skip
    # The end tells of the whole run, not of its last attempt.
    end, end_again = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, interrupted[0]))
    assert end_again["train_loss"] == pytest.approx(end["train_loss"], rel=1e-6)
    assert end_again["train_samples_per_second"] * end_again["train_runtime"] == pytest.approx(
        end["train_samples_per_second"] * end["train_runtime"], rel=1e-2
    )
    evaluations = [[(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e] for history in (one, three)]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[1]] == [6, 12]
    assert {entry["restarts"] for entry in three if "loss" in entry} == {0, 1, 2}


def test_wandb_has_one_run_of_three_attempts(interrupted, cctv_dataset):
    run, _, _ = interrupted
    # A fourth file is of the W&B process that the first attempt's TERM ended with it; its history is told again.
    attempts = [attempt for attempt in read_attempts(run) if attempt["exit_code"] is not None]
    assert {attempt["id"] for attempt in attempts} == {(run / "wandb_run_id.txt").read_text().strip()}
    assert [(attempt["exit_code"], attempt["preempting"]) for attempt in attempts] == [
        (75, True),
        (75, True),
        (0, False),
    ]
    history = [entry for attempt in attempts for entry in attempt["history"]]
    steps = [entry["train/global_step"] for entry in history if "train/global_step" in entry]
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == 12
    restarts = [entry["train/restarts"] for entry in history if "train/restarts" in entry]
    assert restarts == sorted(restarts) and set(restarts) == {0, 1, 2}
    wanted = {
        "train/samples_per_second",
        "train/data_wait",
        "eval/loss",
        "eval/count_mae_train_median",
        "eval/answers/path",
    }
    assert wanted <= {key for entry in history for key in entry}
    config = attempts[-1]["config"]
    recipe = yaml.safe_load((ROOT / "scripts/configs/llava_sample.yaml").read_text())
    assert (config["learning_rate"], config["projector"]) == (recipe["learning_rate"], "full")
    manifest = hashlib.sha256((cctv_dataset / "manifest.json").read_bytes()).hexdigest()[:12]
    assert f"manifest:{manifest}" in attempts[0]["tags"] and "processes:1" in attempts[0]["tags"]
    summary = attempts[-1]["summary"]
    assert summary["completed"] is True and "always answering the training median" in summary["verdict"]
    tables = list(run.glob("wandb/offline-run-*/files/media/table/eval/*.table.json"))
    assert len(tables) == 2  # step 6, step 12
    for path in tables:
        table = json.loads(path.read_text())
        assert table["columns"] == ["image", "question", "truth", "answer", "answer_count"] and len(table["data"]) == 4


def test_no_secret_is_written_or_printed(interrupted):
    run, _, printed = interrupted
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20 and "train_llava.py" in printed and "wandb-core" in printed
    for secret in SECRETS.values():
        assert secret not in printed
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_tensorboard_shows_the_same_scalars_as_one_curve_and_the_pictures(interrupted):
    run, _, _ = interrupted
    events = EventAccumulator(str(run / "runs"), size_guidance={"scalars": 0, "images": 0}).Reload()
    logged = {
        key
        for attempt in read_attempts(run)
        for entry in attempt["history"]
        for key in entry
        if key.startswith(("train/", "eval/")) and not key.startswith("eval/answers")
    }
    assert logged - {"train/global_step"} <= set(events.Tags()["scalars"])
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == sorted(steps) and steps[-1] == 12
    pictures = events.Images("eval/answers")
    assert [picture.step for picture in pictures] == [6, 12]
    assert (pictures[0].width, pictures[0].height) == (8 * 160, 160 + 14)
