"""Each change to another library is noticed when its name goes, and saves what it is there for."""

import json
import os
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_command
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from finetuning import upstream
from finetuning.upstream import ENTRIES, TESTED, Entry, UpstreamChanged
from support.step_costs import sample_trainer

PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if "==" in line)


class Library:
    """Stands for a class of a library."""

    def method(self, first, second=None, **kwargs):
        return "library"


@pytest.fixture
def entries(monkeypatch):
    """`entries(*names)`: upstream knows these of `Library` and of nothing else."""

    def of(*names: str, arguments: tuple[str, ...] = ()) -> None:
        owner = f"torch.{Library.__qualname__}"
        monkeypatch.setattr(Library, "__module__", "torch")
        monkeypatch.setattr(upstream, "ENTRIES", [Entry(owner, name, "a test", arguments) for name in names])

    return of


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.owner.rpartition('.')[2]}.{entry.name}")
def test_every_name_is_there_and_takes_what_was_tested(entry):
    upstream.check(entry, upstream.resolve(entry.owner))


def test_tested_versions_are_the_pinned_ones():
    assert {library: tested[0] for library, tested in TESTED.items()} == {name: PINS[name] for name in TESTED}


def test_replacing_returns_what_was_there(entries):
    entries("method", arguments=("first", "first, second, **kwargs"))
    instance = Library()
    assert upstream.replace(instance, "method", lambda first: "ours")(1) == "library"
    assert instance.method(1) == "ours"


def test_a_name_that_is_gone_is_an_error_that_names_both_versions(entries):
    entries("renamed")
    with pytest.raises(
        UpstreamChanged, match=rf"Library.renamed is gone. Installed is torch .*, tested was {TESTED['torch'][0]}"
    ):
        upstream.replace(Library(), "renamed", None)
    with pytest.raises(UpstreamChanged, match="is gone"):
        upstream.overrides(type("Ours", (Library,), {"renamed": lambda self: None}))


def test_other_arguments_are_an_error(entries):
    entries("method", arguments=("first, cache", "first"))
    with pytest.raises(
        UpstreamChanged, match=r"takes \(first, second, \*\*kwargs\), expected \(first, cache\) or \(first\)"
    ):
        upstream.overrides(type("Ours", (Library,), {"method": lambda self: None}))


def test_what_is_not_declared_is_an_error(entries):
    entries()
    with pytest.raises(TypeError, match="method is replaced: add it"):
        upstream.replace(Library(), "method", None)
    with pytest.raises(TypeError, match="overrides a library's method: add it"):
        upstream.overrides(type("Ours", (Library,), {"method": lambda self: None}))


def test_an_untested_version_is_said_once(monkeypatch, entries):
    entries("method")
    monkeypatch.setitem(TESTED, "torch", ["0.1"])
    upstream.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match="tested was 0.1: pip install -r requirements.txt") as said:
        for _ in range(2):
            upstream.replace(Library(), "method", None)
    assert len(said) == 1
    upstream.warn_if_untested.cache_clear()


# What a step costs more without an entry, under DeepSpeed's ZeRO-2 in bf16. Entries of one line are left out together,
# because their costs differ.
WAITS, NORMS, SLICES = "aten._local_scalar_dense", "aten.linalg_vector_norm", "aten.slice"
SAVED = [
    {
        "is_invalid_grad_norm": WAITS,
        "scaled_global_norm": NORMS,
        "_update_model_bit16_weights": SLICES,
        "train": "train",
    },
    {"_clip_grad_norm": WAITS, "named_parameters": "_named_members"},
    {"_get_grad_norm": WAITS, "floating_point_ops": "num_parameters"},
]


@pytest.fixture(scope="module")
def costs(tiny_llava, cctv_dataset, tmp_path_factory) -> dict[str, dict[str, int]]:
    """Names of entries -> how often the third step of a training without them does what; "" is the real one."""
    result = run_command(
        *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/deepspeed_zero2.yaml"),
        *("--num_processes", "1", "tests/support/step_costs.py"),
        *(tiny_llava, cctv_dataset, tmp_path_factory.mktemp("costs"), *map(",".join, SAVED)),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests/support/on_cpu:tests:scripts:."},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("COSTS"))[6:])


@pytest.mark.parametrize("names", SAVED, ids=",".join)
def test_a_step_costs_more_without(names, costs):
    for name, cost in names.items():
        assert costs[",".join(names)].get(cost, 0) > costs[""].get(cost, 0), name


def test_a_step_waits_for_one_value_and_walks_nowhere(costs):
    assert costs[""][WAITS] == 1  # the stop signals, which on GPUs are read a step later
    assert not costs[""].keys() & {"_named_members", "train", "num_parameters"}


@pytest.fixture(scope="module")
def trainer(tiny_llava, cctv_dataset, tmp_path_factory):
    return sample_trainer(tiny_llava, cctv_dataset, tmp_path_factory.mktemp("run"))


def test_the_wait_for_data_is_timed(trainer):
    collate = trainer.data_collator

    def collate_slowly(rows):
        time.sleep(0.05)
        return collate(rows)

    trainer.data_collator = collate_slowly
    trainer.train()
    trainer.data_collator = collate
    assert next(entry["data_wait"] for entry in trainer.state.log_history if "data_wait" in entry) > 0


class Devices(TorchDispatchMode):
    """Where anything but a copy is computed."""

    def __init__(self):
        super().__init__()
        self.used: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is not torch.ops.aten._to_copy:
            self.used |= {value.device.type for value in args if isinstance(value, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def test_supervised_tokens_are_counted_where_the_loss_is(trainer):
    batches = iter([{"labels": torch.tensor([[-100, 1, 2]])}])
    with Devices() as devices:
        _, count = trainer.get_batch_samples(batches, 1, torch.device("meta"))
    assert count.device.type == "meta"
    assert devices.used == {"meta"}


def test_ddp_keeps_gradients_where_it_averages_them(trainer):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        model = DistributedDataParallel(layers, **trainer.accelerator.ddp_handler.to_kwargs())
        model(torch.ones(1, 4)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in layers.parameters()}) == 1
