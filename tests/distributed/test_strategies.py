"""The same recipe by one process and by two, under each strategy, through `accelerate launch` with the shipped files.

A CPU trains in fp32, so that numbers can be compared to 1e-5. What a CPU cannot do is left to benchmarks/multi_gpu.py:
16-bit types, NCCL, and models of a real size. Five launches; the others are forked (`support/forked_launch.py`), since most
of a launch's time is imports.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import train_llava
from conftest import ROOT
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from finetuning.arguments import parse_arguments
from finetuning.training.resume import refuse_other_sharding
from support.fork_server import Commands
from support.raw_data import with_pictures

SAMPLE = ROOT / "scripts" / "configs" / "llava_sample.yaml"
STRATEGIES = ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]
LORA = {
    "language_model": "lora",
    "projector": "full",
    "vision_tower": "full",
    "lora_r": 4,
    "lora_alpha": 8,
    # Each part with a rate of its own: the optimizer's groups are divided, sharded and read again.
    "learning_rate_projector": 5e-5,
    "learning_rate_vision_tower": 2e-5,
    "lora_plus_ratio": 4,
}
FULL = {"language_model": "full", "projector": "full", "vision_tower": "frozen"}
RECIPE = {
    "global_batch_size": 4,
    "train_sampling_strategy": "sequential",
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
    "eval_steps": 2,
    # The loss falls, so that the "best" checkpoint is the one before the last.
    "load_best_model_at_end": "true",
    "metric_for_best_model": "loss",
    "greater_is_better": "true",
    # Three answers in batches of two: the second of two processes has fewer.
    "eval_answers": 3,
    "per_device_eval_batch_size": 2,
    "eval_max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def dataset(cctv_dataset, tmp_path_factory) -> Path:
    """Of four rows the last two have no picture: read in order, the second process of two sees none in any step."""
    splits, folder = with_pictures(cctv_dataset), tmp_path_factory.mktemp("data") / "half"
    rows = splits["train"]
    splits["train"] = rows.map(
        lambda row, number: {"images": [] if number % 4 > 1 else row["images"]},
        with_indices=True,
        features=rows.features,
    )
    splits.save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def words(tiny_llava, dataset):
    """`words(run, **flags)`: the flags of the recipe that all runs share, and these."""

    def of(run: Path, **flags) -> list[str]:
        flags = {"model_name_or_path": tiny_llava, "dataset_name": dataset, "output_dir": run} | RECIPE | flags
        return [word for key, value in flags.items() for word in (f"--{key}", str(value))]

    return of


@pytest.fixture(scope="module")
def train_alone(words):
    """`train_alone(run, **flags)`: the command by one process, which is this one."""
    return lambda run, **flags: train_llava.main(*parse_arguments(SAMPLE, words(run, **flags)))


@pytest.fixture(scope="module")
def train(words):
    """`train(strategy, run, **flags)`: the command by two processes, launched; its output when it ends well."""

    def launch(strategy: str, run: Path, **flags) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support" / "on_cpu")}
        # On one machine a port in use is no obstacle: accelerate takes another.
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1] if strategy == "ddp" else 0
            result = subprocess.run(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)),
                    *("--config_file", ROOT / "accelerate_configs" / f"{strategy}.yaml", "--num_processes", "2"),
                    *(ROOT / "scripts" / "train_llava.py", "--config", SAMPLE, *words(run, **flags)),
                ],
                cwd=ROOT,
                env=environment,
                text=True,
                capture_output=True,
                timeout=600,
                check=False,
            )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return launch


@pytest.fixture(scope="module")
def fork(words, tmp_path_factory):
    """`fork(strategy, run, **flags)`: as `train`, by forked processes; one that is `refused` ends with a code."""
    commands = Commands(tmp_path_factory.mktemp("logs"))

    def launch(strategy: str, run: Path, processes: int = 2, refused: bool = False, **flags) -> str:
        result = commands.run(
            *("tests/support/forked_launch.py", "--config_file", f"accelerate_configs/{strategy}.yaml"),
            *("--num_processes", processes, "scripts/train_llava.py", "--config", SAMPLE, *words(run, **flags)),
        )
        assert bool(result.code) == refused, result.log
        return result.log

    yield launch
    commands.close()


@pytest.fixture(scope="module")
def one(train_alone, tmp_path_factory) -> Path:
    """The folder of the LoRA run by one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train_alone(folder, **LORA)
    return folder


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """`trained(strategy)`: the folder of the LoRA run by two processes, trained once in this module."""

    @cache
    def run(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp(strategy) / "run"
        assert "  14 LoRA layers computed in one piece" in train(strategy, folder, **LORA)
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
def test_two_processes_train_what_one_trains(one, trained, strategy):
    two = trained(strategy)
    assert logged(two, "loss")[0] == pytest.approx(logged(one, "loss")[0], abs=1e-5)
    assert logged(two, "grad_norm")[0] == pytest.approx(logged(one, "grad_norm")[0], rel=1e-5)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), abs=1e-4)
    assert_same_weights(two / "checkpoint-4", one / "checkpoint-4", "adapter_model.safetensors", tolerance=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_save_and_answer_as_one_does(one, trained, strategy):
    two = trained(strategy)
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == names
    assert {"adapter_model.safetensors", "metrics.json", "checkpoint-2", "checkpoint-4"} <= names
    # The best checkpoint is what the run ends with.
    assert_same_weights(two, two / "checkpoint-2", "adapter_model.safetensors", tolerance=0)
    assert json.loads((two / "metrics.json").read_text(encoding="utf-8"))["kept_step"] == 2
    # The projector is trained in full, and part of every checkpoint (LLaVA#844).
    assert any("multi_modal_projector" in key for key in load_file(two / "checkpoint-2" / "adapter_model.safetensors"))
    for key in ("eval_loss", "eval_count_n", "eval_count_penalised_mae", "eval_count_unparsable_rate"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=1e-5), key
    assert logged(two, "eval_count_n") == [3, 3]


def test_lora_of_layers_that_deepspeed_shards_is_saved_in_full(one, fork, tmp_path):
    """peft#2450, accelerate#3508: saved as `Size([0])`. Without fused LoRA DeepSpeed shards the layers, not we."""
    flags = LORA | {
        "fused_lora": "false",
        "gradient_checkpointing": "true",
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    fork("deepspeed_zero3", tmp_path / "run", **flags, max_steps=2)
    assert_same_weights(tmp_path / "run", one / "checkpoint-2", "adapter_model.safetensors", tolerance=2e-5)


def interrupt(finished: Path, run: Path, last: str) -> None:
    """A copy of a finished run as it was before it wrote its `last` checkpoint."""
    shutil.copytree(finished, run)
    shutil.rmtree(run / last)
    for path in [run / "metrics.json", *run.glob("*.safetensors")]:
        path.unlink()


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_sharded_run_continues_where_it_stopped(fork, trained, tmp_path, strategy):
    run = tmp_path / "run"
    interrupt(trained(strategy), run, "checkpoint-4")
    assert "checkpoint-2" in fork(strategy, run, **LORA)
    assert logged(run, "loss") == pytest.approx(logged(trained(strategy), "loss"), abs=1e-6)
    for name in (".", "checkpoint-4"):
        assert_same_weights(run / name, trained(strategy) / name, "adapter_model.safetensors", tolerance=1e-6)


def test_a_checkpoint_of_replicated_weights_is_not_read_as_one_of_sharded_weights(trained):
    checkpoint = trained("deepspeed_zero3") / "checkpoint-4"
    refuse_other_sharding(checkpoint, {"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match="are full, in this launch they are sharded"):
        refuse_other_sharding(checkpoint, {"zero_optimization": {"stage": 3}})


def test_fsdp2_shards_a_4bit_base_and_continues_with_fewer_and_more(fork, train_alone, tmp_path):
    flags = {name: flag for name, flag in LORA.items() if name != "learning_rate_vision_tower"}
    flags |= {"vision_tower": "frozen", "load_in_4bit": "true"}
    flags |= {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    train_alone(tmp_path / "one", **flags)
    # One row at once: gradients of two are added before they are averaged.
    flags |= {"bnb_4bit_quant_storage": "float32", "save_strategy": "steps", "save_steps": 1}
    fork("fsdp2", tmp_path / "two", **flags, per_device_train_batch_size=1)
    for processes in (1, 4):
        again = tmp_path / f"by{processes}"
        interrupt(tmp_path / "two", again, "checkpoint-2")
        assert "checkpoint-1" in fork("fsdp2", again, processes=processes, **flags)
        assert logged(again, "loss") == pytest.approx(logged(tmp_path / "two", "loss"), abs=1e-5)
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), abs=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one", "adapter_model.safetensors", tolerance=2e-5)


@pytest.mark.parametrize(
    ("strategy", "again", "processes"),
    [("ddp", "ddp", 4), ("ddp", "fsdp2", 1), ("deepspeed_zero3", "fsdp2", 1), ("fsdp2", "deepspeed_zero3", 4)],
)
def test_lora_continues_with_fewer_and_more_under_any_name(fork, trained, tmp_path, strategy, again, processes):
    """The same rows a step, by `global_batch_size`; a checkpoint holds nothing that is sharded."""
    run = tmp_path / "run"
    interrupt(trained(strategy), run, "checkpoint-4")
    assert "checkpoint-2" in fork(again, run, processes=processes, **LORA)
    assert logged(run, "loss") == pytest.approx(logged(trained(strategy), "loss"), abs=1e-5)
    assert_same_weights(run, trained(strategy), "adapter_model.safetensors", tolerance=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero3"])
def test_run_of_two_processes_continues_with_one(one, train_alone, trained, tmp_path, strategy):
    run = tmp_path / "run"
    interrupt(trained(strategy), run, "checkpoint-4")
    train_alone(run, **LORA)
    assert logged(run, "loss") == pytest.approx(logged(trained(strategy), "loss"), abs=1e-5)
    for name in (".", "checkpoint-4"):
        assert_same_weights(run / name, one / name, "adapter_model.safetensors", tolerance=2e-5)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("strategy", ["deepspeed_zero1", "deepspeed_zero2"])
def test_zero_1_and_2_refuse_another_number_of_processes_and_change_nothing(
    fork, trained, tmp_path, strategy, processes
):
    run = tmp_path / "run"
    interrupt(trained(strategy), run, "checkpoint-4")
    before = contents(run)
    said = fork(strategy, run, processes=processes, refused=True, **LORA)
    assert f"written by 2 processes, these are {processes}: DeepSpeed's state is sharded over 2" in said
    assert contents(run) == before


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_full_fine_tune_is_saved_as_one_model_and_continues(fork, train_alone, tmp_path, strategy):
    # Plain descent: Adam's first steps would make sign flips of numbers near zero as large as any step.
    flags = FULL | {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "eval_answers": 0}
    flags |= {"optim": "sgd", "learning_rate": 0.1}
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    train_alone(one, **flags)
    fork(strategy, two, **flags)
    interrupt(two, again, "checkpoint-2")
    fewer = shutil.copytree(again, tmp_path / "fewer")
    if strategy == "fsdp2":  # its shards are laid out anew
        assert "checkpoint-1" in fork(strategy, fewer, processes=1, **flags)
    else:
        before = contents(fewer)
        for processes in (1, 4):
            said = fork(strategy, fewer, processes=processes, refused=True, **flags)
            assert f"written by 2 processes, these are {processes}: DeepSpeed's state is sharded over 2" in said
        assert contents(fewer) == before
    assert "checkpoint-1" in fork(strategy, again, processes=4 if strategy == "fsdp2" else 2, **flags)
    for run in (two, again, fewer) if strategy == "fsdp2" else (two, again):
        # After the second step the model is what one process made of it; the run ends with the weights of the first.
        assert logged(run, "eval_loss") == pytest.approx(logged(one, "eval_loss"), abs=1e-5)
        assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["kept_step"] == 1
        assert_same_weights(run, one, "model.safetensors", tolerance=2e-5)
    assert LlavaForConditionalGeneration.from_pretrained(two).num_parameters() == 1_125_504
