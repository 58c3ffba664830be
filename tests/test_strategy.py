"""One fact of a launch, from its environment and from its file: how the work is divided."""

import pytest
import yaml

from finetuning.strategy import SHARDS_LAYERS_ONLY, STRATEGIES, Strategy

SHARDS = {
    "single_gpu": (),
    "ddp": (),
    "deepspeed_zero1": ("optimizer",),
    "deepspeed_zero2": ("optimizer", "gradients"),
    "deepspeed_zero3": ("optimizer", "gradients", "weights"),
    "deepspeed_zero3_offload": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}


def environment_of(name: str, processes: int) -> dict[str, str]:
    """The variables that `accelerate launch --config_file accelerate_configs/<name>.yaml` sets, written out by hand."""
    config = yaml.safe_load((STRATEGIES / f"{name}.yaml").read_text(encoding="utf-8"))
    variables = {"WORLD_SIZE": str(processes)}
    if deepspeed := config.get("deepspeed_config"):
        variables |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(deepspeed["zero_stage"]),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": deepspeed.get("offload_optimizer_device", "none"),
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": deepspeed.get("offload_param_device", "none"),
        }
    if config.get("fsdp_config"):
        variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return variables


@pytest.mark.parametrize("name", SHARDS)
def test_a_launch_and_its_file_are_one_strategy(monkeypatch, name):
    processes = 1 if name == "single_gpu" else 4
    for variable, value in environment_of(name, processes).items():
        monkeypatch.setenv(variable, value)
    launched, written = Strategy.from_environment(), Strategy.from_file(name)
    assert (launched.kind, launched.stage, launched.offloads) == (written.kind, written.stage, written.offloads)
    assert launched.num_processes == processes
    assert launched.shards == SHARDS[name] and launched.shards_weights == ("weights" in SHARDS[name])
    assert launched.replicates == (name in ("single_gpu", "ddp"))


def test_names_in_messages():
    strategies = [Strategy("one process"), Strategy("DDP"), Strategy("ZeRO", 2), Strategy("FSDP", 2)]
    assert [str(strategy) for strategy in strategies] == ["one process", "DDP", "ZeRO-2", "FSDP2"]
    assert [strategy.layout for strategy in strategies] == [*["one process or DDP"] * 2, "DeepSpeed", "FSDP2"]


@pytest.mark.parametrize(("kind", "name"), [("ZeRO", "ZeRO-3"), ("FSDP", "FSDP2")])
def test_a_launch_whose_layers_alone_are_sharded_is_ddp_but_for_its_name(monkeypatch, kind, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(SHARDS_LAYERS_ONLY, kind)
    launched = Strategy.from_environment()
    assert (str(launched), launched.layout, launched.shards) == (name, "one process or DDP", ("weights",))
    assert not launched.is_deepspeed and not launched.is_fsdp and not launched.replicates
