"""Families under ZeRO-3 and FSDP2: two processes train what one trains, where one sees no picture.

DoRA's norms are taken of weights that are there one layer at a time. Biases of Qwen2 and norms behind Gemma 3's products keep their layers from the project's own shards (`fuse_lora`): DeepSpeed
and PyTorch shard them.
"""

import json

import pytest
import torch
import train_llava
from safetensors.torch import load_file

from finetuning.arguments import parse_arguments
from support.families import dataset_of, make, rows_of_all_shapes
from support.fork_server import Commands
from support.training import SAMPLE, folders

SHARDING = ("deepspeed_zero3", "fsdp2")
FLAGS = (
    *("--lora_r", "4", "--lora_alpha", "8", "--projector", "full", "--vision_tower", "frozen", "--max_steps", "2"),
    *("--train_sampling_strategy", "sequential", "--global_batch_size", "4", "--per_device_train_batch_size", "2"),
    *("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--logging_steps", "1", "--learning_rate", "1e-4"),
    *("--eval_strategy", "no", "--eval_answers", "0", "--save_strategy", "no"),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Of four rows the last two have no picture: read in order, the second process of two sees none."""
    shapes = rows_of_all_shapes()
    with_picture, without = [shapes[0], shapes[3], shapes[8], shapes[2]], shapes[-1]
    rows = [*with_picture[:2], without, without, *with_picture[2:], without, without]
    rows = [row | {"image_id": str(number)} for number, row in enumerate(rows)]  # each a sequence of its own
    return dataset_of(rows, rows[:2], tmp_path_factory.mktemp("data") / "half")


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("logs"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def one(tmp_path_factory, dataset):
    """`one(family, *flags)`: the base and the run by one process, of each family and flags once."""
    runs = {}

    def train(family, *flags):
        if (family, *flags) not in runs:
            base = make(family, tmp_path_factory.mktemp(family) / "base")
            run = tmp_path_factory.mktemp(family) / "run"
            train_llava.main(*parse_arguments(SAMPLE, [*folders(base, dataset, run), *FLAGS, *flags]))
            runs[family, *flags] = base, run
        return runs[family, *flags]

    return train


def logged(run, key):
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[key] for entry in history if key in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "strategy", "flags"),
    [
        *((family, strategy, ()) for family in ("llava_next", "llava_onevision", "gemma3") for strategy in SHARDING),
        *(("llava_next", strategy, ("--use_dora", "true")) for strategy in SHARDING),
    ],
)
def test_two_processes_train_what_one_trains(family, strategy, flags, one, fork, dataset, tmp_path):
    base, expected = one(family, *flags)
    two = tmp_path / "two"
    launched = fork.run(
        *("tests/support/forked_launch.py", "--config_file", f"accelerate_configs/{strategy}.yaml"),
        *(
            "--num_processes",
            2,
            "scripts/train_llava.py",
            "--config",
            SAMPLE,
            *folders(base, dataset, two),
            *FLAGS,
            *flags,
        ),
    )
    assert launched.code == 0, launched.log[-4000:]
    assert logged(two, "loss") == pytest.approx(logged(expected, "loss"), abs=1e-5)
    assert logged(two, "grad_norm") == pytest.approx(logged(expected, "grad_norm"), rel=1e-5)
    weights, reference = (load_file(run / "adapter_model.safetensors") for run in (two, expected))
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=2e-5)
