"""Stops and cut checkpoints of two processes, by `accelerate launch` with the shipped files. Only in make test-faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from finetuning.run_folder import METRICS, read_progress
from support.cases_of_faults import train_words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("FAULTS") != "whole", reason="launches of minutes: make test-faults"),
]
STRATEGIES = ["ddp", "deepspeed_zero2", "fsdp2"]


def launch(strategy: str, words: list[str | Path], log: Path) -> subprocess.Popen:
    """A training by two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support" / "on_cpu")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
    command += ["--config_file", f"accelerate_configs/{strategy}.yaml", *map(str, words)]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


@pytest.fixture(scope="module", params=STRATEGIES)
def trained(request, tiny_llava, cctv_dataset, tmp_path_factory):
    """(strategy, words of its training, its finished run): four steps, a checkpoint of each, two kept."""
    folder = tmp_path_factory.mktemp(request.param)
    words = train_words("llava", tiny_llava, cctv_dataset, folder / "run", global_batch_size=4, save_total_limit=3)
    assert launch(request.param, words, folder / "log").wait() == 0, (folder / "log").read_text()
    return request.param, words, folder / "run"


def test_a_cut_or_missing_file_of_a_checkpoint_is_passed_over(trained, tmp_path):
    strategy, words, run = trained
    expected = (run / "adapter_model.safetensors").read_bytes()
    (run / METRICS).unlink()
    files = sorted(
        (path for path in (run / "checkpoint-4").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    assert launch(strategy, words, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert f"{run / 'checkpoint-4'}: {files[-1].relative_to(run / 'checkpoint-4')}" in said
    assert f"{run / 'checkpoint-3'}: trainer_state.json: missing" in said
    assert f"Continuing from {run / 'checkpoint-2'}" in said
    assert (run / "adapter_model.safetensors").read_bytes() == expected


def test_a_stopped_training_goes_on(trained, tiny_llava, cctv_dataset, tmp_path):
    strategy, _, finished = trained
    run = tmp_path / "run"
    words = train_words("llava", tiny_llava, cctv_dataset, run, global_batch_size=4, save_strategy="no")
    launched = launch(strategy, words, tmp_path / "log")
    deadline = time.monotonic() + 300
    while not read_progress(run).get("attempts") and time.monotonic() < deadline:
        time.sleep(0.05)
    launched.send_signal(signal.SIGTERM)
    launched.wait()
    assert launch(strategy, words, tmp_path / "again").wait() == 0, (tmp_path / "again").read_text()
    assert (run / "adapter_model.safetensors").read_bytes() == (finished / "adapter_model.safetensors").read_bytes()
