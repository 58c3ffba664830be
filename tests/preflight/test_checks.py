"""What cannot work is refused before a weight is loaded, and what can is let through. No launch needs more than a CPU."""

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, run_command, run_here
from datasets import Dataset, Image, List
from PIL import Image as Picture
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForImageTextToText,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from finetuning import arguments
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments, parse_arguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.device import (
    choose_precision,
    launched_precision,
    refuse_more_processes_than_gpus,
    weight_dtype,
)
from finetuning.kernels.lora_layers import fuse_lora
from finetuning.models import loading as models
from finetuning.models.loading import device_map_of_this_process, load_base_model, quantization_config
from finetuning.models.parts import count_parameters
from finetuning.models.processing import load_config
from finetuning.models.trainable import gets_no_gradient, set_trainable
from finetuning.preflight import checks as preflight
from finetuning.preflight import features, memory, precision, strategies
from finetuning.strategy import Strategy, divide_batch
from finetuning.training.activation_checkpointing import checkpoint_first
from finetuning.training.resume import resolved_arguments
from support.families import CLIP_L_336
from support.launches import launch_by

CONFIGS = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
T4, A100, H200 = (7, 5), (8, 0), (9, 0)


def training_arguments(tmp_path: Path, **options) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", **options)


def script_arguments(**options) -> ScriptArguments:
    return ScriptArguments(dataset_name="data/cctv", **options)


# The accelerate files


def test_there_is_a_file_for_each_strategy():
    assert list(CONFIGS) == [
        *("cpu", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"),
        *("fsdp2", "single_gpu", "t4"),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_file_and_it_says_no_number_of_processes(name):
    lines = CONFIGS[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and not lines[1].startswith("#")
    config = load_config_from_file(str(CONFIGS[name]))
    assert isinstance(config, ClusterConfig)
    one_process = {"cpu", "single_gpu", "t4"}
    assert config.num_processes == (1 if name in one_process else -1)
    assert config.num_machines == 1 and config.main_process_ip is None
    # accelerate takes any key of these tables without a word: they must be options of its launcher.
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.deepspeed_config, *config.fsdp_config} <= options
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name.removeprefix("deepspeed_zero")[0])
        assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    assert config.mixed_precision == ("fp16" if name == "t4" else None)


# Rows a step


@pytest.mark.parametrize(
    ("rows", "largest", "processes", "expected"),
    [
        (8, 8, 1, (8, 1)),
        (8, 2, 1, (2, 4)),
        (8, 8, 2, (4, 1)),
        (8, 2, 2, (2, 2)),
        (8, 8, 8, (1, 1)),
        (12, 5, 1, (4, 3)),
        (24, 8, 3, (8, 1)),
    ],
)
def test_rows_of_a_step_are_shared_evenly(rows, largest, processes, expected):
    at_once, times = divide_batch(rows, largest, processes)
    assert (at_once, times) == expected
    assert at_once * times * processes == rows and at_once <= largest


@pytest.mark.parametrize(("processes", "nearest"), [(3, "6 or 9"), (16, "16"), (5, "5 or 10")])
def test_rows_that_cannot_be_shared_name_the_nearest_that_can(processes, nearest):
    with pytest.raises(ValueError, match=f"set it to {nearest}, or launch"):
        divide_batch(8, 8, processes)


def test_global_batch_size_decides_accumulation(tmp_path):
    training_args = training_arguments(tmp_path, global_batch_size=32, per_device_train_batch_size=8)
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (8, 4)
    saved = resolved_arguments(training_args)
    assert saved["global_batch_size"] == 32 and "gradient_accumulation_steps" not in saved
    with pytest.raises(ValueError, match="remove gradient_accumulation_steps: 2, or remove global_batch_size"):
        training_arguments(tmp_path, global_batch_size=32, gradient_accumulation_steps=2)


# Precision and devices


@pytest.mark.parametrize(
    ("recipe", "launched", "capability", "expected"),
    [
        ((False, None), "no", T4, (True, False)),
        ((False, None), "no", A100, (False, True)),
        ((False, None), "fp16", A100, (True, False)),
        ((True, None), "fp16", T4, (True, False)),
        ((False, None), "bf16", H200, (False, True)),
        ((True, None), "no", None, (False, False)),
    ],
)
def test_precision_of_recipe_launch_and_gpu(monkeypatch, recipe, launched, capability, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision(*launched_precision(*recipe), capability) == expected


def test_precisions_that_disagree_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="the launch says mixed_precision: bf16, the recipe fp16"):
        launched_precision(True, None)
    with pytest.raises(ValueError, match=r"compute capability 7\.5 and bf16 needs 8\.0"):
        choose_precision(*launched_precision(False, None), T4)


def test_more_processes_than_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(arguments, "compute_capability", lambda: T4)
    with pytest.raises(ValueError, match="8 processes on this machine, but it shows 2 GPUs"):
        training_arguments(tmp_path)  # as a recipe is read, before any process takes a GPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuse_more_processes_than_gpus()


# Combinations

QLORA = {"load_in_4bit": True}
REENTRANT, NOT_REENTRANT = {"use_reentrant": True}, {"use_reentrant": False}
ALL_FULL = {"language_model": "full", "projector": "full"}


@pytest.mark.parametrize(
    ("how", "model", "training", "script", "message"),
    [
        ("ZeRO-3", QLORA, {}, {}, r"ZeRO-3 cannot shard quantised weights.*peft#2016.*ddp\.yaml"),
        ("ZeRO-3", {"load_in_8bit": True}, {}, {}, "ZeRO-3 cannot shard quantised weights"),
        ("FSDP2", QLORA, {}, {}, "set bnb_4bit_quant_storage: float32, which is uint8"),
        (
            "FSDP2",
            QLORA | {"bnb_4bit_quant_storage": "bfloat16"},
            {},
            {},
            r"\(bitsandbytes#1945\): set bnb_4bit_quant_storage: float32, which is bfloat16",
        ),
        ("FSDP2", {"load_in_8bit": True}, {}, {}, "FSDP2 cannot shard 8-bit weights: set load_in_4bit: true"),
        ("FSDP2", {}, {}, {}, "FSDP without GPUs: accelerate would train plain DDP without a word"),
        (
            "FSDP2",
            {},
            {"optim": "paged_adamw_8bit"},
            {},
            r"paged_adamw_8bit.*bitsandbytes#1633.*set optim: adamw_torch",
        ),
        ("FSDP1", {}, {}, {}, r"fsdp_version 1 is not supported here: launch with accelerate_configs/fsdp2\.yaml"),
        ("DDP", QLORA, {"gradient_checkpointing_kwargs": REENTRANT}, {}, r"'marked ready twice' \(trl#921"),
        ("ZeRO-3", {}, {"gradient_checkpointing_kwargs": NOT_REENTRANT}, {}, r"turned into true by TRL \(trl#2514\)"),
        ("ZeRO-3", {}, {"gradient_checkpointing_kwargs": {"selective": True}}, {}, "Remove selective"),
        ("one process", {}, {"gradient_checkpointing_kwargs": {"selective": True}}, {}, "Remove selective"),
        ("one process", QLORA, {}, ALL_FULL, "quantised weights cannot be trained in full"),
    ],
)
def test_combination_is_refused(monkeypatch, tmp_path, how, model, training, script, message):
    training_args = training_arguments(tmp_path, **training)
    launch_by(monkeypatch, how)
    found = strategies.strategy_problems(script_arguments(**script), training_args, ModelArguments(**model))
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize(
    ("how", "model", "training", "script"),
    [
        ("one process", QLORA, {}, {}),
        ("DDP", QLORA, {}, {}),
        ("DDP", {}, {"gradient_checkpointing_kwargs": NOT_REENTRANT}, {}),
        ("ZeRO-1", QLORA, {}, {}),
        ("ZeRO-2", QLORA, {}, {}),
        ("ZeRO-3", {}, {}, {}),
        ("ZeRO-3", {}, {}, ALL_FULL),
    ],
)
def test_combination_is_let_through(monkeypatch, tmp_path, how, model, training, script):
    training_args = training_arguments(tmp_path, **training)
    launch_by(monkeypatch, how)
    assert strategies.strategy_problems(script_arguments(**script), training_args, ModelArguments(**model)) == []


def test_offloaded_optimizer_must_be_one_that_can_be(monkeypatch, tmp_path):
    training_args = training_arguments(tmp_path, optim="paged_adamw_8bit")
    launch_by(monkeypatch, "ZeRO-3", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    (problem,) = strategies.strategy_problems(script_arguments(), training_args, ModelArguments())
    assert "set optim: adamw_torch" in problem


def test_one_process_that_sees_two_gpus(tmp_path):
    training_args = training_arguments(tmp_path)
    training_args._n_gpu = 2
    (problem,) = strategies.strategy_problems(script_arguments(), training_args, ModelArguments())
    assert "ddp.yaml --num_processes 2" in problem and "CUDA_VISIBLE_DEVICES=0" in problem


@pytest.mark.parametrize(
    ("attention", "capability", "message"),
    [
        ("flash_attention_2", T4, "needs compute capability 8.0, this GPU has 7.5"),
        ("flash_attention_3", A100, "needs compute capability 9.0, this GPU has 8.0"),
        ("flash_attention_2", None, "needs a GPU"),
        ("flash_attention_2", A100, "flash_attn is not installed: set attn_implementation: sdpa"),
        ("flash_attention", A100, "is unknown; there are sdpa, packed, eager"),
        ("kernels-community/flash-attn2", H200, "comes from the Hub by the package kernels, which is not installed"),
        ("flex_attention", None, "flex_attention has no backward pass on a CPU: set attn_implementation: sdpa"),
        ("flex_attention", A100, None),
        ("packed", T4, None),
        ("sdpa", T4, None),
        ("eager", None, None),
        (None, None, None),
    ],
)
def test_attention_against_the_gpu(tmp_path, attention, capability, message):
    text = Dataset.from_dict({"messages": ["a"]})
    given = script_arguments(), training_arguments(tmp_path), ModelArguments(attn_implementation=attention)
    found = precision.precision_problems(*given, text, capability, LlavaConfig())
    assert ([message in problem for problem in found] == [True]) if message else found == []


def test_attention_against_rows_with_images(monkeypatch, tmp_path):
    given = script_arguments(), training_arguments(tmp_path, bf16=False)
    (problem,) = precision.precision_problems(
        *given, ModelArguments(attn_implementation="packed"), rows(1), A100, LlavaConfig()
    )
    assert "packed is for text" in problem and problem.endswith("set sdpa")
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda package: package)
    given[1].bf16 = True
    flash = ModelArguments(attn_implementation="flash_attention_2")
    alone, together = (rows(1, 1).add_column("image_id", ids) for ids in (["a", "b"], ["a", "a"]))
    assert precision.precision_problems(*given, flash, alone, A100, LlavaConfig()) == []
    (problem,) = precision.precision_problems(*given, flash, together, A100, LlavaConfig())
    assert "takes no mask, which dialogues that share their image need" in problem
    given[0].share_image_prefix = False
    assert precision.precision_problems(*given, flash, together, A100, LlavaConfig()) == []


@pytest.mark.parametrize(
    ("dtype", "computes", "script", "refused"),
    [
        ("bfloat16", "fp16", {}, True),
        ("float16", "bf16", {}, True),
        ("float16", "fp16", {}, False),
        ("float32", "bf16", {"projector": "full"}, False),
        ("auto", "fp16", {}, False),
        ("bfloat16", None, {}, False),
        ("bfloat16", None, {"projector": "full"}, True),
    ],
)
def test_type_of_the_weights_against_that_of_the_run(tmp_path, dtype, computes, script, refused):
    training_args = training_arguments(tmp_path)
    training_args.fp16, training_args.bf16 = computes == "fp16", computes == "bf16"
    given = script_arguments(**script), training_args, ModelArguments(dtype=dtype)
    found = precision.precision_problems(*given, rows(1), T4 if computes == "fp16" else A100, LlavaConfig())
    assert ["BFloat16 != Half): remove dtype" in problem for problem in found] == [True] * refused


@pytest.mark.parametrize(("precision", "dtype"), [({"fp16": True}, torch.float16), ({"bf16": True}, torch.bfloat16)])
def test_quantised_weights_compute_in_the_type_of_the_run(precision, dtype):
    """4 bits on a V100 or a T4 must not compute in bf16 (qlora#71, unsloth#7506)."""
    config = quantization_config(
        ModelArguments(load_in_4bit=True), weight_dtype(**{"fp16": False, "bf16": False} | precision)
    )
    assert config.bnb_4bit_compute_dtype == dtype


def test_attention_that_a_config_names_is_not_asked_for(tiny_llava, tmp_path):
    """FlashAttention 'only supports Ampere', even after it was switched off (LLaVA-NeXT#224, ms-swift#1603)."""
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["_attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(config))
    for given, expected in [(None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")]:
        model = load_base_model(str(folder), dtype=torch.float32, attn_implementation=given)
        assert model.config._attn_implementation == model.config.text_config._attn_implementation == expected
    with torch.device("meta"):  # as the checks before a training make it
        assert AutoModelForImageTextToText.from_config(load_config(str(folder))).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("script", "training", "model", "how", "capability", "message"),
    [
        ({}, {}, {}, "one process", A100, None),
        (
            {"checkpoint_layers": "0"},
            {"padding_free": True},
            {"attn_implementation": "packed"},
            "one process",
            H200,
            None,
        ),
        ({"checkpoint_layers": "9"}, {"gradient_checkpointing": False}, {}, "one process", A100, None),
        ({"checkpoint_layers": "9"}, {}, {}, "one process", A100, "checkpoint_layers: 9 (auto or 0 would do)"),
        ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}, "one process", A100, "_kwargs"),
        ({}, {}, {}, "one process", T4, "no GPU of compute capability 8.0"),
        ({}, {}, {}, "one process", None, "no GPU of compute capability 8.0"),
        ({}, {}, {}, "DDP", A100, "a launch by DDP"),
        ({"fused_lora": False}, {}, {}, "one process", A100, "fused_lora: false"),
        ({"language_model": "full"}, {}, {}, "one process", A100, "language_model: full"),
        ({}, {}, {"attn_implementation": "eager"}, "one process", A100, "eager (sdpa or packed would do)"),
        ({}, {"padding_free": True}, {}, "one process", A100, "sdpa with rows side by side (packed would do)"),
    ],
)
def test_cuda_graphs_against_all_that_they_cannot_do(
    monkeypatch, tmp_path, script, training, model, how, capability, message
):
    text = Dataset.from_dict({"messages": ["a"]})
    training_args = training_arguments(tmp_path, **{"gradient_checkpointing": True} | training)
    launch_by(monkeypatch, how)
    given = script_arguments(cuda_graphs=True, **script), training_args, ModelArguments(**model)
    found = features.graph_problems(*given, text, capability)
    assert ([message in problem for problem in found] == [True]) if message else found == []
    (with_images,) = features.graph_problems(*given, rows(1), capability)
    assert with_images.startswith("cuda_graphs cannot go with images in the rows")
    assert features.graph_problems(script_arguments(**script), *given[1:], rows(1), capability) == []


@pytest.mark.parametrize(
    ("script", "training", "model", "images", "message"),
    [
        ({"number_loss": "crps"}, {}, {}, 2, None),
        ({"number_loss": "ntl"}, {}, {}, 0, None),
        ({"number_loss": "ntl", "share_image_prefix": True}, {}, {}, 2, None),
        ({"number_loss": "crps"}, {}, {}, 0, "rows of text alone (ntl would do)"),
        ({"number_loss": "crps", "share_image_prefix": True}, {}, {}, 2, "dialogues that share an image"),
        (
            {"number_loss": "crps"},
            {},
            {"attn_implementation": "eager"},
            2,
            "attn_implementation: eager (sdpa would do)",
        ),
        ({"number_loss": "crps"}, {"loss_type": "dft"}, {}, 2, "loss_type: dft (nll would do)"),
        ({"number_loss": "ntl"}, {"label_smoothing_factor": 0.1}, {}, 2, "label_smoothing_factor"),
        ({"number_loss": "ntl", "cuda_graphs": True}, {}, {}, 0, "cuda_graphs: true"),
    ],
)
def test_number_loss_against_all_that_would_ignore_it(tmp_path, script, training, model, images, message):
    given = script_arguments(**script), training_arguments(tmp_path, **training), ModelArguments(**model)
    data = rows(images) if images else Dataset.from_dict({"messages": ["a"]})
    found = features.number_loss_problems(*given, LlavaConfig(), data)
    assert ([message in problem for problem in found] == [True]) if message else found == []


# Rows


def rows(*images_per_row: int) -> Dataset:
    picture = Picture.new("RGB", (4, 4))
    columns = {"images": [[picture] * number for number in images_per_row], "row": list(range(len(images_per_row)))}
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def test_rows_without_image_are_counted():
    assert strategies.rows_without_image(rows(1, 0, 2, 0)) == 2
    assert strategies.rows_without_image(Dataset.from_dict({"messages": ["a"]})) == 0


@pytest.mark.parametrize(
    ("how", "script", "searches", "message"),
    [
        ("ZeRO-1", {"projector": "full"}, None, None),
        ("FSDP2", {"vision_tower": "lora"}, None, None),
        ("DDP", {"projector": "full"}, False, "remove ddp_find_unused_parameters: false"),
        ("DDP", {"projector": "full"}, None, None),
        ("DDP", {}, False, None),
        ("one process", {"projector": "full"}, None, None),
    ],
)
def test_rows_without_image_leave_what_sees_without_gradient(monkeypatch, tmp_path, how, script, searches, message):
    """Expected to have finished reduction in the prior iteration (LlamaFactory#6376, ms-swift#587)."""
    script_args, mixed = script_arguments(**script), rows(1, 0)
    training_args = training_arguments(tmp_path, ddp_find_unused_parameters=searches)
    launch_by(monkeypatch, how)
    training_args.ddp_find_unused_parameters = strategies.searches_unused_parameters(script_args, training_args, mixed)
    found = strategies.image_problems(script_args, training_args, mixed)
    assert ([message in problem for problem in found] == [True]) if message else found == []
    assert strategies.image_problems(script_args, training_args, rows(1, 1)) == []


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_rows_with_images_are_not_packed(tmp_path, option):
    training_args = training_arguments(tmp_path, **{option: True})
    (problem,) = preflight.row_problems(training_args, rows(1))
    assert problem.startswith("packing and padding_free are for text")
    assert preflight.row_problems(training_args, Dataset.from_dict({"messages": ["a"]})) == []


def test_options_for_text_are_named_where_rows_have_images(tmp_path):
    given = {"assistant_only_loss": False, "dataset_num_proc": 2}
    found = preflight.row_problems(training_arguments(tmp_path, **given), rows(1))
    assert [problem.split(" has no effect on rows with images")[0] for problem in found] == [
        "assistant_only_loss: False",
        "dataset_num_proc: 2",
    ]
    text = Dataset.from_dict({"messages": ["a"]})
    assert preflight.row_problems(training_arguments(tmp_path, **given), text) == []
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    assert {key: default for key, (default, _) in preflight.FOR_TEXT.items()} == {
        key: defaults[key] for key in preflight.FOR_TEXT
    }


def test_max_length_where_nothing_is_cut(tmp_path):
    training_args = training_arguments(tmp_path, max_length=700)
    (problem,) = preflight.row_problems(training_args, rows(1, 1))
    assert problem.startswith("max_length: 700 has no effect on rows with images")
    assert "Remove it from the recipe" in problem and "check_data.py --max_length 700" in problem
    assert preflight.row_problems(training_args, Dataset.from_dict({"messages": ["a"]})) == []


def test_options_that_would_end_in_a_stack_trace(tmp_path):
    def found(capability: tuple[int, int] | None, **given) -> list[str]:
        return [
            problem.split(":")[0]
            for problem in features.option_problems(training_arguments(tmp_path, **given), capability)
        ]

    assert found(None) == found(T4) == []
    assert found(H200, use_liger_kernel=True) == ["use_liger_kernel"]
    assert [problem.split()[0] for problem in found(H200, auto_find_batch_size=True)] == ["auto_find_batch_size"]
    (problem,) = features.option_problems(training_arguments(tmp_path, activation_offloading=True), None)
    assert problem.startswith("activation_offloading") and "there is no GPU: remove it" in problem
    assert found(H200, activation_offloading=True) == []


def test_a_token_is_no_flag(tmp_path):
    recipe = ROOT / "scripts" / "configs" / "llava_qlora.yaml"
    with pytest.raises(ValueError, match=r"hub_token: .*set HF_TOKEN or WANDB_API_KEY in the environment") as refused:
        parse_arguments(recipe, ["--hub_token", "hf_secretsecret"])
    assert "hf_secretsecret" not in str(refused.value)


def test_steps_and_epochs_are_not_both_asked_for(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    words = "model_name_or_path: models/x\ndataset_name: data/cctv\noutput_dir: outputs/run\nnum_train_epochs: 2\n"
    recipe.write_text(words, encoding="utf-8")
    assert parse_arguments(recipe, ["--max_steps", "4"])[1].max_steps == 4  # a flag overrides the recipe
    with pytest.raises(ValueError, match=r"max_steps: 4 and num_train_epochs: 5\.0 say both how long"):
        parse_arguments(recipe, ["--max_steps", "4", "--num_train_epochs=5"])
    recipe.write_text(recipe.read_text(encoding="utf-8") + "max_steps: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match="remove num_train_epochs, or set max_steps: -1"):
        parse_arguments(recipe, [])
    assert parse_arguments(recipe, ["--max_steps", "-1"])[1].num_train_epochs == 2


@pytest.mark.parametrize(
    ("script", "images", "asked", "expected"),
    [
        ({}, (1, 1), None, False),
        ({}, (1, 0), None, False),
        ({"projector": "full"}, (1, 1), None, False),
        ({"projector": "full"}, (1, 0), None, True),
        ({"vision_tower": "lora"}, (0, 1), None, True),
        ({}, (1, 1), True, True),
    ],
)
def test_ddp_searches_unused_parameters_only_where_a_batch_can_leave_some(tmp_path, script, images, asked, expected):
    training_args = training_arguments(tmp_path, ddp_find_unused_parameters=asked)
    assert strategies.searches_unused_parameters(script_arguments(**script), training_args, rows(*images)) is expected


# Weights


def test_every_trained_parameter_gets_a_gradient(tiny_llava):
    processor = LlavaProcessor.from_pretrained(tiny_llava)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    script_args = script_arguments(language_model="lora", projector="full", vision_tower="full")
    last = model.config.vision_config.num_hidden_layers - 1
    model = set_trainable(model, script_args, ModelArguments(lora_r=4))
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7 people."}]
    batch = LlavaDataCollator(processor)([{"messages": messages, "images": [Picture.new("RGB", (64, 64), "red")]}])
    model(**batch).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert any(f"layers.{last - 1}." in name for name in trained if "vision_tower" in name)
    behind = [name for name, _ in model.named_parameters() if gets_no_gradient(name, model.config)]
    assert any(f"layers.{last}." in name for name in behind) and not trained & set(behind)


@pytest.mark.parametrize("searches", [False, True])
def test_checkpointed_qlora_trains_under_ddp(tiny_llava, searches):
    """'Marked ready twice' (trl#921, peft#313, accelerate#3536): not so with the checkpointing that is applied here."""
    quantization = quantization_config(ModelArguments(load_in_4bit=True), torch.float32)
    model = load_base_model(str(tiny_llava), dtype=torch.float32, quantization=quantization)
    model = set_trainable(model, script_arguments(projector="full"), ModelArguments(lora_r=4, lora_dropout=0.0)).train()
    assert fuse_lora(model) == 14
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7 people."}]
    collate = LlavaDataCollator(LlavaProcessor.from_pretrained(tiny_llava))
    batch = collate([{"messages": messages, "images": [Picture.new("RGB", (64, 64), "red")]}])

    def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
        for _ in range(2):  # the second pass is the one that finds marks of the first
            model.zero_grad()
            module(**batch, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients(model)
    checkpoint_first(model, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = gradients(DistributedDataParallel(model, find_unused_parameters=searches))
    finally:
        dist.destroy_process_group()
    assert len(found) == 2 * 14 + 4
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize(("how", "dtype"), [("DDP", torch.float32), ("ZeRO-3", torch.float16)])
def test_trained_weights_are_fp32_masters_unless_deepspeed_holds_them(monkeypatch, tiny_llava, how, dtype):
    """fp16 masters end in `Attempting to unscale FP16 gradients` (LLaVA#294, transformers#30559)."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float16)
    launch_by(monkeypatch, how)
    model = set_trainable(model, script_arguments(projector="full"), ModelArguments(lora_r=4))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {dtype}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.float16}


@pytest.fixture
def published_llava(tmp_path) -> Path:
    """config.json of the published LLaVA-1.5-7B; no weights."""
    LlavaConfig(
        vision_config=CLIP_L_336,
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
        image_token_index=32000,
        vision_feature_layer=-2,
    ).save_pretrained(tmp_path / "llava-1.5-7b")
    return tmp_path / "llava-1.5-7b"


@pytest.mark.parametrize(
    ("script", "model", "how", "capability", "messages"),
    [
        ({}, {}, "one process", H200, []),
        ({}, {"lora_target_modules": ["all-linear"]}, "DDP", (8, 9), []),
        ({}, {}, "ZeRO-2", H200, []),
        ({}, {}, "one process", A100, ["compute capability 8.0 (8.9 or newer would do)"]),
        ({}, {}, "ZeRO-3", H200, ["a launch by ZeRO-3, where weights come and go (accelerate_configs/ddp.yaml or"]),
        ({}, {}, "FSDP2", H200, ["a launch by FSDP2"]),
        ({"fused_lora": False}, {}, "one process", H200, ["fused_lora: false (true would do)"]),
        ({"language_model": "full"}, {}, "one process", H200, ["language_model: full (lora would do)"]),
        ({}, QLORA, "one process", None, ["a CPU (compute", "quantised weights (load_in_4bit: false would do)"]),
        ({}, {"use_dora": True}, "one process", H200, ["use_dora: true"]),
        (
            {},
            {"lora_target_modules": ["q_proj", "v_proj"]},
            "one process",
            H200,
            ["without down_proj, gate_proj, k_proj"],
        ),
    ],
)
def test_fp8_against_all_that_it_cannot_do(
    monkeypatch, tmp_path, script, model, how, capability, messages, published_llava
):
    training_args = training_arguments(tmp_path)
    launch_by(monkeypatch, how)
    given = training_args, ModelArguments(**model), capability, load_config(str(published_llava))
    found = features.base_precision_problems(script_arguments(base_precision="fp8_backward", **script), *given)
    assert len(found) == bool(messages)
    assert all(message in found[0] for message in messages)
    assert features.base_precision_problems(script_arguments(**script), *given) == []


def test_fp8_against_models_that_it_does_not_fit(tmp_path):
    given = script_arguments(base_precision="fp8_backward"), training_arguments(tmp_path), ModelArguments(), H200
    assert features.base_precision_problems(*given, LlamaConfig(num_key_value_heads=4)) == []
    (problem,) = features.base_precision_problems(
        *given, LlamaConfig(hidden_size=72, intermediate_size=100, num_attention_heads=9)
    )
    assert problem == (
        "base_precision: fp8_backward cannot go with layers of width 72, 100 (multiples of 16 would do): leave "
        "base_precision out, or change that"
    )
    (problem,) = features.base_precision_problems(*given, Gemma2Config())
    assert "a model of type gemma2 (llama or mistral or qwen2 or gemma would do)" in problem


@pytest.mark.parametrize(
    ("model", "capability", "config", "message"),
    [
        ({}, H200, LlamaConfig(num_key_value_heads=4), None),
        (QLORA, H200, LlamaConfig(num_key_value_heads=4), None),
        ({}, (8, 9), LlamaConfig(), "compute capability 8.9 (9.0 would do)"),
        ({}, (10, 0), LlamaConfig(), "compute capability 10.0 (9.0 would do)"),
        ({}, None, LlamaConfig(), "a CPU (compute capability 9.0 would do)"),
        ({}, H200, LlamaConfig(), "a launch by ZeRO-2 (accelerate_configs/ddp.yaml would do)"),
        ({"lora_r": 4}, H200, LlamaConfig(), "lora_r: 4 (a multiple of 8 would do)"),
        (
            {},
            H200,
            LlamaConfig(hidden_size=576, num_attention_heads=9),
            "layers of width 576 (multiples of 128 would do)",
        ),
    ],
)
def test_int8_against_what_it_cannot_do(monkeypatch, tmp_path, model, capability, config, message):
    training_args = training_arguments(tmp_path)
    launch_by(monkeypatch, "ZeRO-2" if message is not None and "ZeRO-2" in message else "one process")
    found = features.base_precision_problems(
        script_arguments(base_precision="int8"),
        training_args,
        ModelArguments(**{"lora_r": 64} | model),
        capability,
        config,
    )
    assert len(found) == (message is not None)
    assert message is None or f"base_precision: int8 cannot go with {message}" in found[0]


def test_what_is_trained_is_counted_without_weights(tmp_path, published_llava):
    given = training_arguments(tmp_path), ModelArguments(lora_r=64)
    config = load_config(str(published_llava))
    placed = memory.place_without_weights(config, script_arguments(), *given)
    counts = count_parameters(placed)
    trained = sum(part["trainable"] for part in counts.values())
    assert trained == 159_907_840
    assert sum(part["total"] for part in counts.values()) - trained == 7_063_427_072
    with pytest.raises(ValueError, match="every part is frozen"):
        memory.place_without_weights(config, script_arguments(language_model="frozen"), *given)


# Memory

ADAPTED = {"language_model": "lora", "projector": "frozen", "vision_tower": "frozen"}


@pytest.fixture(scope="module")
def placed() -> dict[str, torch.nn.Module]:
    """Models without weights by how their language model is trained: to make one takes seconds."""
    return {}


@pytest.fixture
def describe(monkeypatch, placed, published_llava):
    """`describe(how, placement, offload=..., **flags)`: the job of LLaVA-1.5-7B by two processes, or by one."""

    def job(how: str, placement: dict, *, offload: bool = False, **flags) -> memory.Job:
        device = "cpu" if offload else "none"
        launch_by(
            monkeypatch,
            how,
            ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=device,
            ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=device,
        )
        training_args = SimpleNamespace(
            optim=SimpleNamespace(value=flags.pop("optim", "adamw_torch_fused")),
            world_size=1 if how == "one process" else 2,
            deepspeed_plugin=None,
        )
        given = script_arguments(**placement), training_args, ModelArguments(lora_r=64, **flags)
        if placement["language_model"] not in placed:
            config = load_config(str(published_llava))
            placed[placement["language_model"]] = memory.place_without_weights(config, *given)
        return memory.describe_job(placed[placement["language_model"]], *given)

    return job


def test_what_is_held_of_lora_on_7b(describe):
    job = describe("one process", ADAPTED)
    assert (job.trained, job.frozen, job.quantisable) == (159_907_840, 7_063_427_072, 32 * 202_375_168)
    assert memory.least_memory(job) == {
        "weights": 2 * 7_063_427_072 + 4 * 159_907_840,
        "gradients": 4 * 159_907_840,
        "optimizer": 8 * 159_907_840,
    }
    quantised = memory.least_memory(describe("DDP", ADAPTED, load_in_4bit=True, optim="paged_adamw_8bit"))
    assert (
        quantised["weights"] == (0.5 + 1 / 64) * job.quantisable + 2 * (job.frozen - job.quantisable) + 4 * job.trained
    )
    assert quantised["optimizer"] == 0
    assert set(memory.least_memory(describe("ZeRO-3", ADAPTED, offload=True)).values()) == {0}
    in_full = describe("one process", ADAPTED | ALL_FULL)
    assert memory.least_memory(in_full)["weights"] == 4 * (in_full.frozen + in_full.trained) == 4 * 7_063_427_072
    in_full = describe("one process", ADAPTED | ALL_FULL, dtype="bfloat16")
    assert memory.least_memory(in_full)["weights"] == 2 * in_full.frozen + 4 * in_full.trained


@pytest.mark.parametrize(
    ("how", "placement", "flags", "measured"),
    [
        ("DDP", ADAPTED, {}, 30.1),
        ("ZeRO-2", ADAPTED, {}, 29.7),
        ("ZeRO-3", ADAPTED, {}, 24.4),
        ("FSDP2", ADAPTED, {}, 22.7),
        ("DDP", ADAPTED, {"load_in_4bit": True}, 21.3),
        ("FSDP2", ADAPTED, {"load_in_4bit": True}, 17.9),
        ("ZeRO-3", ADAPTED | ALL_FULL, {}, 57.3),
    ],
)
def test_least_memory_is_less_than_was_measured(describe, how, placement, flags, measured):
    """The peaks of the README, in GiB; of full fine-tuning nearly all is weights, gradients and optimizer."""
    needs = sum(memory.least_memory(describe(how, placement, **flags)).values()) / 2**30
    assert needs < measured
    assert needs > 50 or "lora" in placement.values()


def test_table_of_the_training_page(describe):
    columns = [
        describe("DDP", ADAPTED, load_in_4bit=True),
        *(describe(how, ADAPTED) for how in ("DDP", "ZeRO-3")),
        *(describe(how, ADAPTED | ALL_FULL) for how in ("DDP", "ZeRO-2", "ZeRO-3")),
    ]
    for processes in (2, 4, 8):
        jobs = [replace(job, strategy=replace(job.strategy, num_processes=processes)) for job in columns]
        cells = [f"{sum(memory.least_memory(job).values()) / 2**30:.1f}" for job in jobs]
        for page in ("training.md", "training.ko.md"):
            assert f"| {processes} | {' | '.join(cells)} |" in (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ddp", "Each GPU must hold at least 15.5 GiB, before it sees a row"),
        ("deepspeed_zero3", "at least 7.8 GiB as one of 2, 3.9 GiB as one of 4, 1.9 GiB as one of 8, before"),
        ("deepspeed_zero3_offload", "only activations must fit on the GPUs"),
    ],
)
@pytest.mark.slow
def test_a_job_is_told_its_memory_before_it_queues(published_llava, name, line):
    words = ("scripts/train_llava.py", name, "--config", "scripts/configs/llava_lora.yaml")
    result = run_here("scripts/check_recipe.py", *words, "--model_name_or_path", published_llava)
    assert result.returncode == 0 and line in result.stdout
    assert result.stdout.startswith(f"scripts/train_llava.py under {name}: data/cctv -> outputs/llava-lora\n")


def test_files_and_the_strategies_that_they_launch():
    both = ("optimizer", "weights")
    assert {name: Strategy.from_file(name) for name in CONFIGS} == {
        **{name: Strategy("one process") for name in ("cpu", "single_gpu", "t4")},
        **{f"deepspeed_zero{stage}": Strategy("ZeRO", stage) for stage in (1, 2, 3)},
        "ddp": Strategy("DDP"),
        "deepspeed_zero3_offload": Strategy("ZeRO", 3, offloads=both),
        "fsdp2": Strategy("FSDP", 2),
    }


@pytest.mark.parametrize(
    ("how", "placement", "flags", "gib", "message"),
    [
        (
            "one process",
            ADAPTED,
            {},
            14.6,
            "memory: each GPU must hold at least 15.5 GiB before it sees a row (weights 13.8, gradients 0.6, optimizer 1.2), "
            "and has 14.6: set load_in_4bit: true, or launch with accelerate_configs/deepspeed_zero2.yaml on 2 GPUs, or",
        ),
        ("one process", ADAPTED | ALL_FULL, {}, 79.1, "and has 79.1: launch with accelerate_configs/deepspeed_zero2.yaml on 2 GPUs, or"),
        ("ZeRO-2", ADAPTED | ALL_FULL, {}, 22.0, "deepspeed_zero3.yaml on 5 GPUs, or launch with accelerate_configs/deepspeed_zero3_offload.yaml"),
        ("DDP", ADAPTED, {"load_in_4bit": True}, 6.0, "and has 6.0: launch with accelerate_configs/fsdp2.yaml on 2 GPUs"),
        ("DDP", ADAPTED, {"load_in_8bit": True}, 7.0, "and has 7.0: set load_in_4bit: true"),
        ("DDP", ADAPTED, {"load_in_4bit": True}, 14.6, None),
        ("one process", ADAPTED, {}, None, None),
    ],
)  # fmt: skip
def test_gpus_that_are_too_small_are_refused(describe, how, placement, flags, gib, message):
    found = memory.memory_problems(describe(how, placement, **flags), None if gib is None else int(gib * 2**30))
    assert ([message in problem for problem in found] == [True]) if message else found == [], found
    assert "fsdp2.yaml" not in str(found) or flags == {"load_in_4bit": True}  # it shards no 8-bit weights


# Disk

Usage = namedtuple("Usage", ["total", "used", "free"])
LORA_7B = {"language_model": {"trainable": 159_907_840, "lora": 159_907_840, "total": 7_063_427_072}}


def test_checkpoints_must_fit_on_the_disk(monkeypatch, tmp_path):
    training_args = training_arguments(
        tmp_path, per_device_train_batch_size=8, num_train_epochs=1, save_strategy="steps", save_steps=10
    )
    assert preflight.num_checkpoints(training_args, 800) == 10
    # 12 bytes a trained number in a checkpoint, 4 in the result: 10 * 1.919 + 0.640 GB.
    needed = 10 * 12 * 159_907_840 + 4 * 159_907_840
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    assert preflight.disk_problems(training_args, LORA_7B, 800) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    (problem,) = preflight.disk_problems(training_args, LORA_7B, 800)
    assert "the run needs 18.5 GiB (10 checkpoints of 1.8 GiB and the result)" in problem
    training_args.save_total_limit = 1
    assert preflight.disk_problems(training_args, LORA_7B, 800) == []


def test_output_folder_must_be_one(tmp_path):
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    (problem,) = preflight.disk_problems(training_arguments(tmp_path), {}, 10)
    assert problem.startswith("output_dir:") and "is a file" in problem


def test_output_folder_must_be_writable(monkeypatch, tmp_path):
    assert preflight.disk_problems(training_arguments(tmp_path), {}, 10) == []
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # nothing is forbidden to root
    (problem,) = preflight.disk_problems(training_arguments(tmp_path), {}, 10)
    assert problem.startswith(f"output_dir: no permission to write in {tmp_path}: give another folder")


# The command


@pytest.mark.slow
def test_the_command_reports_every_problem_at_once_and_touches_nothing(tmp_path, published_llava, cctv_dataset):
    """Of a 7B model, whose weights are not even there."""
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    result = run_command(
        *("scripts/train_llava.py", "--model_name_or_path", published_llava, "--dataset_name", cctv_dataset),
        *("--output_dir", tmp_path / "run", "--attn_implementation", "flash_attention_2"),
        *("--lora_target_modules", "q_proj,", "v_proj", "--max_length", "700"),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("train_llava.py: this run cannot work:") :]
    assert message.count("\n  - ") == 4
    assert "max_length: 700 has no effect" in message
    assert "flash_attention_2 needs a GPU" in message
    assert "['q_proj,'] match no linear layer" in message
    assert f"{tmp_path / 'run'} is a file" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava-1.5-7b", "run"]


def test_device_map_is_no_flag_and_a_model_goes_to_its_own_process_s_gpu(monkeypatch):
    """`device_map="auto"` under DDP: can't train a model on a different device (accelerate#1515, LlamaFactory#1707)."""
    with pytest.raises(ValueError, match="device_map"):
        parse_arguments(ROOT / "scripts" / "configs" / "llava_qlora.yaml", ["--device_map", "auto"])
    second = SimpleNamespace(local_process_index=1, device=torch.device("cuda", 1))
    monkeypatch.setattr(models, "PartialState", lambda: second)
    assert device_map_of_this_process() == {"": 1}
