"""Each change to another library is noticed when its name goes, and saves what it is there for."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from conftest import ROOT, run_command
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    core_model_loading,
)
from trl import SFTTrainer

from finetuning import upstream
from finetuning.arguments import parse_arguments
from finetuning.data.dataset import open_dataset, open_split
from finetuning.distributed.barrier import barriers_without_timeout
from finetuning.distributed.fsdp2 import keep_fp32_reductions, set_wrap_classes
from finetuning.distributed.sharded_layers import shard_layers
from finetuning.kernels.lora_layers import fuse_lora
from finetuning.kernels.model_patches import count_image_tokens_once
from finetuning.manifest import has_manifest
from finetuning.models import loading
from finetuning.models.parts import decoder_layers
from finetuning.models.processing import load_processing_class
from finetuning.models.published_names import save
from finetuning.strategy import Strategy
from finetuning.tasks.exam import make_exam
from finetuning.training.trainer import takes_over_checkpointing
from finetuning.upstream import ENTRIES, TESTED, Entry, UpstreamChanged
from support.proofs import PROOFS
from support.step_costs import SAMPLE, sample_trainer
from support.switched_off import without, word_of
from support.tiny_models import (
    DECODER,
    IMAGE_TOKEN,
    LANGUAGE_MODEL,
    TEXT,
    llava_batch,
    loss_and_grads,
    text_batch,
    tiny_llava,
    with_lora,
)

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


def test_every_entry_has_a_test_that_fails_without_it():
    """`python tests/support/proofs.py` shows that it does."""
    assert sorted(PROOFS) == sorted(map(word_of, ENTRIES))
    for proof in set(PROOFS.values()):
        path, _, name = proof.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), proof


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
        "Module.train": "train",
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


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_and_without(*names: str):
    """Runs what follows twice: with all entries, and without those named."""
    yield True
    with without(*names):
        yield False


def test_fsdp2_reduces_in_16_bits_without_our_policy():
    for ours in with_and_without("mixed_precision_policy"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
        keep_fp32_reductions(plugin, quantised=False)
        assert (plugin.mixed_precision_policy.reduce_dtype == torch.float32) is ours


def test_fsdp2_wraps_a_frozen_tower_layer_by_layer_without_our_names():
    for ours in with_and_without("_no_split_modules"):
        model = with_lora(tiny_llava(), LANGUAGE_MODEL)
        set_wrap_classes(model)
        assert ("CLIPEncoder" in model.base_model.model._no_split_modules) is ours


@pytest.mark.slow
def test_4_bit_weights_in_a_buffer_do_not_say_how_they_are_read_without_our_mark(one_process_group, tmp_path):
    """bitsandbytes' own layers ask them wherever the fused layer does not compute."""
    tiny_llava(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=loading.NOT_QUANTISED)
    for ours in with_and_without("quant_state"):
        base = loading.load_base_model(str(tmp_path), dtype=torch.float32, quantization=quantization)
        model = with_lora(base, LANGUAGE_MODEL)
        fuse_lora(model)
        layers = decoder_layers(model)
        shard_layers(model, layers, torch.device("cpu"), from_first=True)
        weight = layers[0].self_attn.q_proj.get_base_layer().weight
        assert not isinstance(weight, torch.nn.Parameter)
        assert hasattr(weight, "quant_state") is ours


def test_processes_wait_in_a_collective_without_our_barrier(one_process_group, monkeypatch):
    """A collective is aborted after its time-out."""
    collectives, state = [], PartialState()
    monkeypatch.setattr(dist, "barrier", lambda *args, **kwargs: collectives.append(True))
    monkeypatch.setattr(state, "distributed_type", DistributedType.MULTI_CPU)
    for ours in with_and_without("wait_for_everyone"):
        collectives.clear()
        with barriers_without_timeout():
            state.wait_for_everyone()
        assert (not collectives) is ours


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_weights_of_zero_3_are_saved_under_names_of_no_class_without_ours(tiny_llava, tmp_path, monkeypatch):
    """There transformers keeps every renaming that it knows, as if this checkpoint had needed them all."""
    monkeypatch.setattr(loading, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(core_model_loading.WeightTransform, "was_used", lambda self: True)
    for ours in with_and_without("_weight_conversions"):
        model = loading.load_base_model(str(tiny_llava), dtype=torch.float32)
        save(model, load_processing_class(str(tiny_llava)), tmp_path / str(ours))
        assert (names_in(tmp_path / str(ours)) == names_in(tiny_llava)) is ours


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Gemma", "Gemma3"])
def test_projections_run_one_by_one_without_our_layer(kind):
    name, window = ("gemma3_text", 16) if kind == "Gemma3" else (kind.lower(), None)
    config = AutoConfig.for_model(name, **TEXT, num_key_value_heads=2, head_dim=8, sliding_window=window)
    called = []
    for ours in with_and_without(f"{kind}DecoderLayer.forward"):
        model = with_lora(AutoModelForCausalLM.from_config(config), DECODER).train()
        fuse_lora(model)
        called.clear()
        for layer in decoder_layers(model):
            layer.self_attn.q_proj.register_forward_hook(lambda *_: called.append(True))
        loss_and_grads(model, text_batch())
        assert (not called) is ours


def test_a_layer_of_the_tower_asks_its_adapters_one_by_one_without_ours():
    called = []
    for ours in with_and_without("Linear.forward"):
        model = with_lora(tiny_llava(), "all-linear").train()
        fuse_lora(model)
        called.clear()
        for name, module in model.named_modules():
            if "vision_tower" in name and name.endswith("lora_A.default"):
                module.register_forward_hook(lambda *_: called.append(True))
        loss_and_grads(model, llava_batch())
        assert (not called) is ours


class Waits(TorchDispatchMode):
    """How often the host waited for a value."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += str(function.overloadpacket) == WAITS
        return function(*args, **(kwargs or {}))


CLIP = CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
SIGLIP = SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
LLAMA = LlamaConfig(**TEXT)
VISION = {
    "LlavaModel": LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE_TOKEN),
    "VipLlavaModel": VipLlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE_TOKEN),
    "LlavaNextModel": LlavaNextConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE_TOKEN),
    "LlavaOnevisionModel": LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE_TOKEN, video_token_index=1
    ),
    "Gemma3Model": Gemma3Config(
        vision_config=SIGLIP, text_config=Gemma3TextConfig(**TEXT, head_dim=8), image_token_index=IMAGE_TOKEN
    ),
}


@pytest.mark.parametrize("name", VISION)
def test_each_pass_counts_the_image_tokens_without_ours(name):
    input_ids, size = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN, 6]]), TEXT["hidden_size"]
    for ours in with_and_without(f"{name}.get_placeholder_mask"):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(VISION[name]).train()
        count_image_tokens_once(model)
        for _ in range(2):  # the first pass counts
            with Waits() as waits:
                model.model.get_placeholder_mask(
                    input_ids, inputs_embeds=torch.zeros(1, 4, size), image_features=torch.zeros(2, size)
                )
        assert (waits.number == 0) is ours


def test_4_bit_weights_would_be_repacked_for_a_cpu_at_the_first_answer(tiny_llava, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=loading.NOT_QUANTISED)
    for ours in with_and_without("support_avx512bf16_for_cpu"):
        model = loading.load_base_model(str(tiny_llava), dtype=torch.float32, quantization=quantization)
        layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        assert layers and any(layer.support_avx512bf16_for_cpu for layer in layers) is not ours


@pytest.fixture(scope="module")
def trained(trainer) -> object:
    """`trainer` after its three steps."""
    if not trainer.state.global_step:
        trainer.train()
    return trainer


def test_a_checkpoint_that_fails_half_way_lies_where_a_restart_looks_without_our_folder(trained, monkeypatch):
    run = Path(trained.args.output_dir)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(trained, "_save_optimizer_and_scheduler", fail)
    for ours in with_and_without("_get_output_dir"):
        with pytest.raises(OSError, match="no space left"):
            trained._save_checkpoint(trained.model, None)
        assert (not list(run.glob("checkpoint-*"))) is ours


def test_a_checkpoint_is_not_proven_whole_without_ours(trained, tmp_path, monkeypatch):
    for ours in with_and_without("_save_checkpoint"):
        monkeypatch.setattr(trained.args, "output_dir", str(tmp_path / str(ours)))
        (tmp_path / str(ours)).mkdir()
        trained._save_checkpoint(trained.model, None)
        (checkpoint,) = (tmp_path / str(ours)).glob("checkpoint-*")
        assert has_manifest(checkpoint) is ours


def test_tokens_are_counted_from_zero_after_a_restart_without_ours(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    trained._save_checkpoint(trained.model, None)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    begun_with = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, *args, **kwargs: begun_with.append(self._total_train_tokens))
    for _ in with_and_without("_total_train_tokens"):
        trained._total_train_tokens = 0
        trained.train(str(checkpoint))
    assert begun_with[0] > 0 == begun_with[1]


def test_a_log_has_no_speed_without_ours(trained):
    for ours in with_and_without("log"):
        trained.state.log_history.clear()
        trained.model.train()
        trained.log({"loss": 1.0})
        assert ("samples_per_second" in trained.state.log_history[-1]) is ours


def test_a_pickle_and_the_card_of_a_model_named_none_lie_beside_the_weights_without_ours(trained, tmp_path):
    for ours in with_and_without("save_model"):
        trained.save_model(str(tmp_path / str(ours)))
        assert (tmp_path / str(ours) / "training_args.bin").is_file() is not ours
    for ours in with_and_without("create_model_card"):
        (tmp_path / "README.md").unlink(missing_ok=True)
        trained.args.output_dir, before = str(tmp_path), trained.args.output_dir
        trained.create_model_card(model_name="sample")
        trained.args.output_dir = before
        assert (tmp_path / "README.md").is_file() is not ours


def test_a_restarted_run_tells_of_its_last_attempt_alone_without_ours(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(trained.state, "global_step", 10)
    told = {}
    for names in ((), ("_finalize_training",), ("_initial_global_step",), ("_total_loss_scalar",)):
        vars(trained.run_sums).update(seconds=100.0, loss=7.0)  # of seven steps before this attempt
        trained._initial_global_step, trained._total_loss_scalar = 7, 3.0
        trained._tr_loss = torch.tensor(0.0)
        with without(*names):
            metrics = trained._finalize_training(None, 10, time.time() - 1).metrics
        told[names] = metrics["train_loss"], metrics["train_runtime"] > 100
    vars(trained.run_sums).update(seconds=0.0, loss=0.0)
    assert told.pop(()) == (1.0, True)
    assert all(other != (1.0, True) for other in told.values())


def test_a_step_out_of_memory_ends_the_run_without_ours(trained, monkeypatch):
    tries, more = [], []

    def out_of_memory_once(self, model, inputs, *args, **kwargs):
        tries.append(inputs)
        if len(tries) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(1.0)

    monkeypatch.setattr(SFTTrainer, "training_step", out_of_memory_once)
    monkeypatch.setattr(trained, "layer_checkpointing", SimpleNamespace(take_more=lambda: more.append(True)))
    trained.model.zero_grad(set_to_none=True)
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert trained.training_step(trained.model, inputs) == 1.0 and more
    with without("training_step"), pytest.raises(torch.OutOfMemoryError):
        trained.training_step(trained.model, inputs)


def test_an_evaluation_asks_nothing_without_ours(trained, cctv_dataset, monkeypatch):
    dataset = open_dataset(str(cctv_dataset), vision=True)
    rows = open_split(dataset, "train", str(cctv_dataset)).select(range(4))
    monkeypatch.setattr(trained, "exam", make_exam(rows, rows, limit=2))
    for ours in with_and_without("evaluate"):
        assert ("eval_score" in trained.evaluate(rows)) is ours


def test_slurms_signal_ends_the_loader_processes_without_ours(trained, monkeypatch):
    """Slurm sends a job's signal to all of its processes (`scancel --signal`, a time limit)."""
    monkeypatch.setattr(trained.args, "dataloader_num_workers", 1)
    for names in ((), ("_get_dataloader",), ("worker_init_fn",)):
        with without(*names), trained.stop_request:
            batches = iter(trained.get_train_dataloader())
            next(batches)
            (worker,) = multiprocessing.active_children()
            # By another process: their own ends them by TERM, too. PyTorch raises where one is lost.
            with contextlib.suppress(RuntimeError):
                subprocess.run(["kill", str(worker.pid)], check=True)
                worker.join(timeout=20 if names else 0.5)
            assert worker.is_alive() is (not names)
            with contextlib.suppress(RuntimeError):
                worker.kill()
                worker.join()
            del batches


# The last: arguments that are made anew take accelerate's state from the trainer above.
def test_transformers_would_checkpoint_as_well_without_the_two_switches(tmp_path):
    for ours in with_and_without("gradient_checkpointing", "activation_checkpointing"):
        args = parse_arguments(SAMPLE, ["--gradient_checkpointing", "true", "--output_dir", str(tmp_path)])[1]
        takes_over_checkpointing(args, Strategy("one process"))
        assert (args.gradient_checkpointing or args.activation_checkpointing) is not ours
