"""Flags that are checked before PyTorch is imported name what the modules behind them know."""

import subprocess
import sys

import pytest
from conftest import ROOT

from finetuning.flags import TASK_NAMES, evaluation_parser
from finetuning.tasks.exam import TASKS


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
    ],
)
def test_a_wrong_path_is_refused_before_pytorch_is_imported(command, flags):
    code = f"import runpy, sys; sys.argv = {[command, *flags]!r}\ntry:\n    runpy.run_path('scripts/{command}', run_name='__main__')\n"
    code += "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'scripts')\n{code}"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert "outputs/none" in result.stdout and result.stdout.rstrip().endswith("False")
