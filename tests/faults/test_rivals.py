"""Two commands that would write the same: the second is refused in one sentence, whatever it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_here

from finetuning.folder_lock import lock_file
from support.training import SAMPLE

HOLD = """
import sys, time
from filelock import SoftFileLock
lock = SoftFileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def rival():
    """`rival(path)`: another process that writes there; its id."""
    processes = []

    def begin(path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(lock_file(path))], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process.pid

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def test_a_second_training_merge_or_generate_is_refused_and_nothing_is_written(
    rival, tiny_llava, cctv_dataset, tmp_path
):
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "adapter_model.safetensors").touch()
    (finished / "arguments.yaml").write_text("model_revision: main\n")
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
