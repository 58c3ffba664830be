"""Flags that are checked before PyTorch is imported name what the modules behind them know."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT

from finetuning.arguments import parse_arguments
from finetuning.command_line import FLAGS
from finetuning.flags import TASK_NAMES, evaluation_parser, nearest_path
from finetuning.run_folder import open_run
from finetuning.tasks.exam import TASKS

PINS = json.loads(FLAGS.read_text(encoding="utf-8"))["versions"]
with_pins = pytest.mark.skipif(
    any(version(name) != pin for name, pin in PINS.items()),
    reason="with other versions than the pinned ones the flags are asked of the libraries, which import PyTorch",
)


def test_every_task_can_be_named():
    assert sorted(TASKS) == sorted(TASK_NAMES)


def test_a_batch_size_is_auto_or_a_number(capsys):
    parser = evaluation_parser("", max_new_tokens=8)
    assert parser.parse_args(["--run", "r"]).batch_size == "auto"
    assert parser.parse_args(["--run", "r", "--batch_size", "4"]).batch_size == 4
    with pytest.raises(SystemExit):
        parser.parse_args(["--run", "r", "--batch_size", "0"])
    assert "expected a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("generate.py", ["--model", "outputs/none", "--question", "How many?"]),
        ("evaluate_llava.py", ["--run", "outputs/none"]),
        ("evaluate_gemma.py", ["--run", "outputs/none"]),
        ("merge_adapter.py", ["--run", "outputs/none", "--output", "models/new"]),
        ("status.py", ["outputs/none"]),
        pytest.param("train_llava.py", ["--dataset_name", "./outputs/none"], marks=with_pins),
        pytest.param("train_gemma.py", ["--model_name_or_path", "outputs/none"], marks=with_pins),
        pytest.param("check_data.py", ["--config", "outputs/none"], marks=with_pins),
        pytest.param("check_recipe.py", ["outputs/none", "ddp"], marks=with_pins),
    ],
)
def test_a_wrong_path_is_refused_before_pytorch_is_imported(command, flags):
    code = f"import runpy, sys; sys.argv = {[command, *flags]!r}\ntry:\n    runpy.run_path('scripts/{command}', run_name='__main__')\n"
    code += "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'scripts')\n{code}"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert "outputs/none" in result.stdout + result.stderr and result.stdout.rstrip().endswith("False")


@with_pins
@pytest.mark.parametrize("command", ["train_llava.py", "train_gemma.py"])
def test_all_wrong_words_are_told_before_pytorch_is_imported(command):
    words = ["--lerning_rate", "1", "--use_peft", "true", "--seed=3", "--max_steps", "4", "--num_train_epochs", "2"]
    result = subprocess.run(
        [sys.executable, "-X", "importtime", f"scripts/{command}", *words],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    (said,) = [line for line in result.stderr.splitlines() if not line.startswith("import time")]
    for part in ("--lerning_rate is no flag; did you mean --learning_rate?", "use_peft has no effect", "max_steps: 4"):
        assert part in said
    assert result.returncode == 1 and " torch\n" not in result.stderr


@with_pins
def test_help_names_every_flag_and_imports_no_pytorch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "scripts/train_llava.py", "--help"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert " torch\n" not in result.stderr
    assert "accelerate launch --config_file accelerate_configs/t4.yaml scripts/train_llava.py" in result.stdout
    assert all(name in result.stdout for name in ("--global_batch_size", "--learning_rate", "--lora_target_modules"))
    own, used, others = result.stdout.partition("settings of this project:")[2].split("settings of TRL and trans")
    assert "--checkpoint_layers" in own and "--global_batch_size" in own and "--learning_rate LEARNING_RATE" not in own
    assert "--learning_rate LEARNING_RATE" in used and "--adam_beta1" in others


def test_a_misspelt_flag_file_and_run_get_the_one_that_is_near(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_llava.py", "--rum", "r"])
    with pytest.raises(SystemExit):
        evaluation_parser("", max_new_tokens=8).parse_args(["--rum", "r"])
    assert "--rum did you mean --run?" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "llava-lora").mkdir(parents=True)
    assert nearest_path("outputs/llava-lroa") == "; did you mean outputs/llava-lora?"
    assert (
        nearest_path("outputs/other") == nearest_path("nowhere/llava-lora") == nearest_path("outputs/llava-lora") == ""
    )
    with pytest.raises(ValueError, match=r"did you mean outputs/llava-lora\?"):
        open_run("outputs/lava-lora")
    recipe = ROOT / "scripts" / "configs" / "llava_sample.yaml"
    with pytest.raises(ValueError, match=r"^--lora_rank is no flag; did you mean --lora_r\?"):
        parse_arguments(recipe, ["--lora_rank", "8"])
    with pytest.raises(ValueError, match=r"did you mean \S*llava_sample.yaml\?"):
        parse_arguments(recipe, ["--config", str(recipe.with_name("llava_smaple.yaml"))])
