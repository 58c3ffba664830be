"""Plans: sizes, lengths, memory and time against the real models, the real collator and what an H200 measured."""

import dataclasses
import json
import sys
from pathlib import Path

import plan
import pytest
import torch
from conftest import ROOT, run_command
from peft import LoraConfig, get_peft_model

from finetuning.data.collator import LlavaDataCollator
from finetuning.data.dataset import open_dataset
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image
from finetuning.device import main_memory
from finetuning.kernels.lora_layers import fuse_lora
from finetuning.model_shape import ModelShape
from finetuning.models.parts import count_parameters, decoder_layers
from finetuning.models.processing import load_processing_class
from finetuning.preflight.layer_memory import FusedLayer
from finetuning.preflight.memory import Job, main_memory_problems
from finetuning.preflight.planned_step import Batch, Training
from finetuning.preflight.planner import TEMPLATES, picture_cost
from finetuning.preflight.row_lengths import RowCounter, lengths_of, mixed, read_split
from finetuning.preflight.step_memory import fewest_checkpointed, peak_memory, process_memory
from finetuning.preflight.step_time import known_gpus, step_seconds
from finetuning.strategy import Strategy
from support.tiny_models import DECODER, tiny_gemma, tiny_gemma3, tiny_llava

GIB = 2**30
LLAVA = ModelShape.from_config(
    {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
        },
        "vision_feature_layer": -2,
    }
)  # fmt: skip
GEMMA = ModelShape.from_config(
    {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
    }
)  # fmt: skip

# Held-out settings of benchmarks/memory_grid.py on an H200: model, method, rank, checkpointed layers, dropout, optimizer,
# packed rows, (rows, length, supervised, pictures, longest, prefix), GiB at the peak.
MEASURED = [
    (LLAVA, "lora", 16, 0, 0.0, "adamw_torch_fused", False, (2, 651, 60, 2, 651, 581), 17.63),
    (LLAVA, "lora", 16, 16, 0.0, "adamw_torch_fused", False, (8, 645, 80, 8, 645, 0), 21.98),
    (LLAVA, "lora", 64, 16, 0.05, "adamw_8bit", False, (8, 605, 80, 8, 605, 0), 22.39),
    (LLAVA, "lora", 16, 0, 0.05, "adamw_torch_fused", False, (16, 605, 160, 16, 605, 0), 41.36),
    (GEMMA, "lora", 8, 0, 0.0, "paged_adamw_8bit", True, (1, 1832, 1680, 0, 229, 0), 7.86),
    (GEMMA, "lora", 32, 9, 0.05, "adamw_8bit", True, (1, 2152, 1680, 0, 269, 0), 7.07),
    (GEMMA, "nf4", 8, 18, 0.05, "adamw_8bit", True, (1, 3664, 3360, 0, 229, 0), 3.19),
    (GEMMA, "nf4", 32, 9, 0.0, "adamw_8bit", True, (1, 1554, 240, 0, 259, 0), 3.68),
    (GEMMA, "full", 0, 0, 0.0, "adamw_torch_fused", True, (1, 7832, 6160, 0, 229, 0), 61.43),
]


def training_of(shape, method, rank, checkpointed, dropout, optimizer, packed=False) -> Training:
    how = "full" if method == "full" else "lora"
    placement = dict.fromkeys(shape.parameters, "frozen") | {"language_model": how}
    return Training(
        shape, placement, rank=rank, checkpointed=checkpointed, dropout=dropout, optimizer=optimizer, packs_rows=packed,
        bits=4 if method == "nf4" else None, nested=True, weight_bytes=4 if method == "full" else 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "shape, method, rank, checkpointed, dropout, optimizer, packed, batch, gib", MEASURED, ids=range(len(MEASURED))
)
def test_peak_memory_is_what_was_measured(shape, method, rank, checkpointed, dropout, optimizer, packed, batch, gib):
    training = training_of(shape, method, rank, checkpointed, dropout, optimizer, packed)
    planned = sum(peak_memory(training, Batch(*batch)).values()) / GIB
    assert planned == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("base_precision, gib", [(None, 29.5), ("fp8_backward", 35.6), ("int8", 29.4)])
def test_peak_memory_of_8_bit_bases_is_what_was_measured(base_precision, gib):
    training = training_of(LLAVA, "lora", 64, 0, 0.0, "adamw_torch_fused")
    training = dataclasses.replace(training, base_precision=base_precision)
    assert sum(peak_memory(training, Batch(8, 607, 72, 8)).values()) / GIB == pytest.approx(gib, rel=0.01)


# LLaVA-1.5-7B, batch 8 of 607 tokens on each of two H200s, GiB at the peak (benchmarks/README.md, Several GPUs).
ON_TWO = [
    ("ddp", "lora", None, 30.1), ("deepspeed_zero2", "lora", None, 29.7), ("deepspeed_zero3", "lora", None, 24.4),
    ("deepspeed_zero3_offload", "lora", None, 17.7), ("ddp", "lora", 4, 21.3), ("deepspeed_zero3", "full", None, 57.3),
    ("fsdp2", "lora", None, 24.1), ("fsdp2", "lora", 4, 19.1),
]  # fmt: skip


@pytest.mark.parametrize("file, how, bits, gib", ON_TWO)
def test_peak_memory_of_strategies_is_what_was_measured(file, how, bits, gib):
    placement = {"language_model": how, "projector": "full" if how == "full" else "frozen", "vision_tower": "frozen"}
    strategy = dataclasses.replace(Strategy.from_file(file), num_processes=2)
    training = Training(
        LLAVA, placement, rank=64, strategy=strategy, bits=bits, checkpointed=32 if how == "full" else 0
    )
    assert sum(peak_memory(training, Batch(8, 607, 72, 8)).values()) / GIB == pytest.approx(gib, rel=0.025)


def test_published_sizes():
    assert sum(LLAVA.parameters.values()) == 7_063_427_072
    assert sum(GEMMA.parameters.values()) == 2_506_172_416
    with pytest.raises(ValueError, match="known are llava, llava_next"):
        ModelShape.from_config({"model_type": "t5"})


@pytest.mark.parametrize("make", [tiny_llava, tiny_gemma, tiny_gemma3])
def test_sizes_of_real_models(make):
    model = make()
    shape = ModelShape.from_config(model.config.to_dict())
    assert shape.parameters == {part: count["total"] for part, count in count_parameters(model).items()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=DECODER))
    placement = dict.fromkeys(shape.parameters, "frozen") | {"language_model": "lora"}
    trained = sum(count["trainable"] for count in count_parameters(adapted).values())
    assert Training(shape, placement, rank=4).trained == trained


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make", [tiny_gemma, tiny_gemma3])
def test_a_fused_layer_keeps_what_is_planned(make, dora):
    # A GPU's attention keeps the same tensors; what a CPU's keeps beside them is left out by its shape.
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=DECODER, use_dora=dora))
    shape = ModelShape.from_config(model.get_base_model().config.to_dict())
    fuse_lora(model)
    kept: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.dim() >= 2:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows, tokens = 2, 24
    ids = torch.randint(3, 90, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    layers = decoder_layers(model)
    found = []
    for layer in layers[:2]:
        layer.register_forward_pre_hook(lambda *_: kept.clear())
        layer.register_forward_hook(lambda *_: found.append(sum(kept.values())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, attention_mask=mask if make is tiny_gemma3 else None, use_cache=False)
    training = Training(shape, {"language_model": "lora"}, rank=4, precision="fp32", weight_bytes=4, dora=dora)
    assert training.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    batch = Batch(rows, tokens, 8)
    layer = FusedLayer(training, batch, 1)
    rotary = 2 * 4 * tokens * shape.text.head_width  # cosines and sines, which all layers share
    # A CPU's keys lie behind its queries, in memory that stays when their copies for every head are made.
    keys = 4 * rows * tokens * shape.text.kv_width if make is tiny_gemma3 else 0
    assert found[1] == layer.keep() + layer.output + rotary + keys


def test_sets_are_counted_as_often_as_their_weights_say(cctv_dataset, tiny_llava):
    shape = ModelShape.from_config(json.loads((tiny_llava / "config.json").read_text()))
    cost = picture_cost({"image_tiles": None, "image_max_tiles": None}, {}, shape)
    counter = RowCounter(tiny_llava, (TEMPLATES / "llava.jinja").read_text(), cost)
    train, test = (
        lengths_of(read_split(str(cctv_dataset), split), counter, shares_prefix=False) for split in ("train", "test")
    )
    both = mixed([(train, 1.0), (test, 2.5)])
    assert both.total == train.total + round(2.5 * test.total)
    expected = (train.total * train.mean("tokens") + 2.5 * test.total * test.mean("tokens")) / both.total
    assert both.mean("tokens") == pytest.approx(expected, rel=0.01)
    longest = [max(row.tokens for row in lengths.longest) for lengths in (train, test)]
    assert both.longest[0].tokens == max(longest)


def test_lengths_are_the_collators(cctv_dataset, tiny_llava):
    processor = load_processing_class(str(tiny_llava))
    shape = ModelShape.from_config(json.loads((tiny_llava / "config.json").read_text()))
    counter = RowCounter(
        tiny_llava,
        (TEMPLATES / "llava.jinja").read_text(),
        picture_cost({"image_tiles": None, "image_max_tiles": None}, {}, shape),
    )
    table = read_split(str(cctv_dataset), "train")
    rows = open_dataset(str(cctv_dataset), vision=True)["train"]
    for shares in (False, True):
        lengths = lengths_of(table, counter, shares_prefix=shares)
        collate = (SharedPrefixCollator if shares else LlavaDataCollator)(processor)
        grouped = group_by_image(rows) if shares else rows
        assert lengths.total == len(grouped)
        for row, counted in zip(
            grouped.select(range(5)) if not shares else map(grouped.__getitem__, range(5)),
            lengths.counted,
            strict=False,
        ):
            batch = collate([row])
            assert counted.tokens == batch["input_ids"].shape[1]
            assert counted.supervised == int((batch["labels"] != -100).sum())


def test_fewest_layers_follow_the_room():
    training, batch = training_of(LLAVA, "nf4", 64, 0, 0.05, "paged_adamw_8bit"), Batch(8, 620, 88, 8)
    counts = [fewest_checkpointed(training, batch, gib * GIB) for gib in (40, 14, 11, 8)]
    assert counts[0] == 0 and counts[-1] is None and counts == [*sorted(counts[:-1]), None]
    enough = dataclasses.replace(training, checkpointed=counts[1])
    assert sum(process_memory(enough, batch).values()) <= 14 * GIB


def test_offloaded_inputs_of_recomputed_layers_take_no_room():
    training = training_of(LLAVA, "nf4", 64, 32, 0.05, "paged_adamw_8bit")
    training = dataclasses.replace(training, accumulates=True)
    needs = [sum(peak_memory(training, Batch(rows, 607, 9 * rows, rows)).values()) for rows in (1, 4)]
    offloads = dataclasses.replace(training, offloads_inputs=True)
    offloaded = [sum(peak_memory(offloads, Batch(rows, 607, 9 * rows, rows)).values()) for rows in (1, 4)]
    inputs = 2 * 607 * LLAVA.text.width * (LLAVA.text.layers - 6)  # bytes a row; of six layers they are on their way
    assert [a - b for a, b in zip(needs, offloaded, strict=True)] == pytest.approx([inputs, 4 * inputs], rel=0.1)


def test_steps_take_what_was_measured():
    gpu, batch = known_gpus()["h200"], Batch(8, 607, 72, 8)
    planned = {
        "lora": sum(step_seconds(training_of(LLAVA, "lora", 64, 0, 0.0, "adamw_torch_fused"), batch, gpu).values()),
        "nf4": sum(step_seconds(training_of(LLAVA, "nf4", 64, 17, 0.0, "adamw_torch_fused"), batch, gpu).values()),
    }
    assert planned == {"lora": pytest.approx(0.238, rel=0.1), "nf4": pytest.approx(0.312, rel=0.1)}


def plan_in(monkeypatch, capsys, *words: str | Path) -> tuple[str, int]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
    try:
        plan.main()
    except SystemExit as ended:
        return capsys.readouterr().out, ended.code
    return capsys.readouterr().out, 0


def test_all_that_is_wrong_is_told_at_once(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: data/x\nlora_rr: 8\nlora_r: many\n")
    with pytest.raises(ValueError, match=r"did you mean lora_r.*\n.*lora_r: many"):
        plan_in(monkeypatch, capsys, "--config", recipe)
    recipe.write_text("dataset_name: data/x\n")
    with pytest.raises(ValueError, match=r"--gppu is no flag.*; model_name_or_path is not set"):
        plan_in(monkeypatch, capsys, "--config", recipe, "--gppu", "t4")


def test_a_plan_for_people_and_for_programs(cctv_dataset, tiny_llava, monkeypatch, capsys):
    recipe = ROOT / "scripts" / "configs" / "llava_lora.yaml"
    words = ["--config", recipe, "--model_name_or_path", tiny_llava, "--dataset_name", cctv_dataset]
    shown, status = plan_in(monkeypatch, capsys, *words, "--gpu", "t4", "h100", "--gpus", "2", "--price", "t4=0.5")
    assert status == 0
    assert "Cheapest that fits (T4 16 GB" in shown and "--num_processes 2 scripts/train_llava.py" in shown
    korean, _ = plan_in(monkeypatch, capsys, *words, "--gpu", "t4", "--language", "ko")
    assert "들어갑니다" in korean
    plans, _ = plan_in(monkeypatch, capsys, *words, "--gpu", "t4", "--json")
    first, *_ = json.loads(plans)
    assert first["peak_bytes"] == pytest.approx(sum(first["memory_bytes"].values()), rel=1e-6)
    assert first["seconds"] == pytest.approx(
        first["steps"] * first["seconds_per_step"] + first["evaluations"] * first["evaluation_seconds"],
        rel=0.05,
        abs=0.05,
    )
    with pytest.raises(ValueError, match=r"expected 2\.50"):
        plan_in(monkeypatch, capsys, *words, "--price", "cheap")
    for flags, told in (
        (["--price", "h100=-1"], "expected a price of 0 or more"),
        (["--gpu", "h100", "--price", "t4=1"], "--price t4: not among --gpu h100"),
        (["--gpu", "h100", "--gpus", "2", "--strategy", "single_gpu"], "single_gpu is one process: --gpus 2 needs"),
        (["--gpu", "h100", "--per_device_train_batch_size", "0"], "per_device_train_batch_size: 0 is out of bounds"),
    ):
        with pytest.raises(ValueError, match=told):
            plan_in(monkeypatch, capsys, *words, *flags)


def test_a_plan_imports_no_torch(cctv_dataset, tiny_llava):
    recipe = ROOT / "scripts" / "configs" / "llava_lora.yaml"
    words = f"--config {recipe} --model_name_or_path {tiny_llava} --dataset_name {cctv_dataset} --gpu t4".split()
    code = f"import sys; sys.path.insert(0, 'scripts'); sys.argv = ['plan.py', *{words}]; import plan; plan.main(); print('torch' in sys.modules)"
    done = run_command("-c", code)
    assert done.stdout.rstrip().endswith("False"), done.stderr


def test_main_memory_must_hold_what_is_offloaded():
    zero_3 = Strategy("ZeRO", 3, num_processes=4, offloads=("optimizer", "weights"))
    job = Job(trained=10**9, frozen=6 * 10**9, quantisable=0, is_lora=True, strategy=zero_3)
    needed = (2 * 7 + 2 + 12) * 10**9  # weights, gradients, masters and Adam's two numbers, of all four processes
    assert main_memory_problems(job, needed, 4, on_gpu=True) == []
    (problem,) = main_memory_problems(job, needed - 1, 4, on_gpu=True)
    assert "26.1 GiB" in problem and "without offload" in problem
    plain = dataclasses.replace(job, strategy=Strategy("one process"))
    assert main_memory_problems(plain, 0, 1, on_gpu=True) == []
    (problem,) = main_memory_problems(plain, 2**30, 1, on_gpu=False)
    assert "train on a GPU" in problem
    assert 0 < main_memory() < 2**50
