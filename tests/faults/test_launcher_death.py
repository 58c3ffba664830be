"""The launcher is killed, and nothing else: its training ends, and does not go on unseen."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from finetuning.run_folder import read_progress
from support.training import SAMPLE

WHOLE = os.environ.get("FAULTS") == "whole"


@pytest.mark.parametrize("strategy", ["cpu", "ddp", *(["deepspeed_zero2", "fsdp2"] if WHOLE else [])])
def test_killing_the_launcher_ends_the_training_within_ten_seconds(tiny_llava, cctv_dataset, tmp_path, strategy):
    run = tmp_path / "run"
    processes = 1 if strategy == "cpu" else 2
    flags = {
        **{"model_name_or_path": tiny_llava, "dataset_name": cctv_dataset, "output_dir": run, "max_steps": 100_000},
        **{
            "global_batch_size": 2,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
        },
        "dataloader_num_workers": 1,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{strategy}.yaml",
    ]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support" / "on_cpu")}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*launch, "scripts/train_llava.py", "--config", str(SAMPLE), *words],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    deadline = time.monotonic() + 300
    while read_progress(run).get("step", 0) < 2:
        assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    trainings = psutil.Process(launcher.pid).children(recursive=True)
    assert len(trainings) >= 2 * processes  # each with its loader worker
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(trainings, timeout=10)
    for process in alive:
        process.kill()
    assert not alive, (tmp_path / "log").read_text()
