"""Two processes, the first of which is busy for longer than any collective would wait."""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import sys, time
from datetime import timedelta

import torch
from accelerate import PartialState

from finetuning.distributed.barrier import barriers_without_timeout

state = PartialState(cpu=True, timeout=timedelta(seconds=1))
prepared = []
for part in range(2):
    with barriers_without_timeout(), state.main_process_first():
        if state.is_main_process:
            time.sleep(2)
        prepared.append(part)
print(f"process {state.process_index} prepared {prepared}", flush=True)
try:
    with state.main_process_first():
        if state.is_main_process:
            time.sleep(2)
except RuntimeError as error:
    print(f"process {state.process_index} gave up", flush=True)
"""


@pytest.mark.slow
def test_others_wait_for_the_first_longer_than_a_collective_would(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            tmp_path / "program.py",
        ],
        cwd=ROOT / "scripts",
        env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": "", "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert sorted(line for line in result.stdout.splitlines() if "prepared" in line) == [
        "process 0 prepared [0, 1]",
        "process 1 prepared [0, 1]",
    ], result.stderr
    assert "process 1 gave up" in result.stdout  # the same wait, by accelerate's own collective
