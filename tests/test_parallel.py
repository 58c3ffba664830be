"""The same recipe by one process and by two, under each strategy, through `accelerate launch` with the shipped files.

A CPU trains in fp32, so that numbers can be compared to 1e-5. What a CPU cannot do is left to benchmarks/multi_gpu.py:
16-bit types, NCCL, full fine-tuning of a real size, and the DeepSpeed optimizer of ZeRO-3 with offload.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

STRATEGIES = ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]
LORA = {"language_model": "lora", "projector": "full", "vision_tower": "lora", "lora_r": 4, "lora_alpha": 8}
RECIPE = {
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    # Three answers in batches of two: the second of two processes has fewer.
    "eval_answers": 3,
    "per_device_eval_batch_size": 2,
    "eval_max_new_tokens": 4,
}


def needs_compiler(strategy: str) -> None:
    if strategy.startswith("deepspeed") and not (shutil.which("g++") and shutil.which("ninja")):
        pytest.skip("DeepSpeed builds its CPU communication at first use: g++ and ninja are not on this machine")


@pytest.fixture(scope="module")
def train(tiny_llava, cctv_dataset):
    """`train(strategy, processes, run, **flags)`: the command itself; its output when it ends well."""

    def launch(strategy: str, processes: int, run: Path, **flags) -> str:
        needs_compiler(strategy)
        flags = {"model_name_or_path": tiny_llava, "dataset_name": cctv_dataset, "output_dir": run} | RECIPE | flags
        # Free port; the interpreter's own folder has ninja.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        if strategy == "fsdp2":
            environment["PYTHONPATH"] = str(ROOT / "tests" / "fsdp_on_cpu")
        result = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
                *("--config_file", ROOT / "accelerate_configs" / f"{strategy}.yaml"),
                *("--num_processes", str(processes)),
                *(ROOT / "scripts" / "train_llava.py", "--config", ROOT / "scripts" / "configs" / "llava_sample.yaml"),
                *(word for key, value in flags.items() for word in (f"--{key}", str(value))),
            ],
            cwd=ROOT,
            env=environment,
            text=True,
            capture_output=True,
            timeout=900,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return launch


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """`trained(strategy, processes)`: the folder of the LoRA run, trained once in this module."""

    @cache
    def run(strategy: str, processes: int) -> Path:
        folder = tmp_path_factory.mktemp(strategy) / "run"
        train(strategy, processes, folder, **LORA)
        return folder

    return run


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def logged(run: Path, key: str) -> list[float]:
    return [entry[key] for entry in history(run) if key in entry]


def assert_same_weights(run: Path, reference: Path, name: str, tolerance: float) -> None:
    weights, expected = load_file(run / name), load_file(reference / name)
    assert weights.keys() == expected.keys() and len(weights) > 10
    for key, tensor in weights.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[key].shape, key
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=tolerance, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_trains(trained, strategy):
    one, two = trained("cpu", 1), trained(strategy, 2)
    assert logged(two, "loss")[0] == pytest.approx(logged(one, "loss")[0], abs=1e-5)
    assert logged(two, "grad_norm")[0] == pytest.approx(logged(one, "grad_norm")[0], rel=1e-5)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-4)
    assert_same_weights(two, one, "adapter_model.safetensors", tolerance=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_save_and_answer_as_one_does(trained, strategy):
    one, two = trained("cpu", 1), trained(strategy, 2)
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == names
    assert {"adapter_model.safetensors", "metrics.json", "checkpoint-2", "checkpoint-4"} <= names
    assert_same_weights(two, two / "checkpoint-4", "adapter_model.safetensors", tolerance=0)
    # The projector is trained in full, and part of every checkpoint (LLaVA#844).
    assert any("multi_modal_projector" in key for key in load_file(two / "checkpoint-2" / "adapter_model.safetensors"))
    for key in ("eval_loss", "eval_count_n", "eval_count_penalised_mae", "eval_count_unparsable_rate"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=1e-5), key
    assert logged(two, "eval_count_n") == [3]


def interrupt(finished: Path, run: Path) -> None:
    """A copy of a finished run as it was after step 2."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "metrics.json").unlink()
    (run / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_divided_run_continues_where_it_stopped(train, trained, tmp_path, strategy):
    run = tmp_path / "run"
    interrupt(trained(strategy, 2), run)
    assert "checkpoint-2" in train(strategy, 2, run, **LORA)
    assert logged(run, "loss") == pytest.approx(logged(trained(strategy, 2), "loss"), abs=1e-6)
    assert_same_weights(run, trained(strategy, 2), "adapter_model.safetensors", tolerance=1e-6)


def test_run_of_two_processes_continues_with_one(train, trained, tmp_path):
    run = tmp_path / "run"
    interrupt(trained("ddp", 2), run)
    train("cpu", 1, run, **LORA)
    assert logged(run, "loss") == pytest.approx(logged(trained("ddp", 2), "loss"), abs=1e-5)
    assert_same_weights(run, trained("cpu", 1), "adapter_model.safetensors", tolerance=2e-5)
