"""Which layers are computed again: the fewest that fit, found by trying, kept for a continuation."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset

from finetuning.kernels.lora_layers import fuse_lora
from finetuning.models.parts import decoder_layers
from finetuning.run_folder import change_arguments
from finetuning.training.activation_checkpointing import (
    SPARE,
    checkpoint_first,
    fewest_that_fit,
    kept_choice,
    longest_rows,
    optimizer_state,
    parse_checkpoint_layers,
    passes_of_a_try,
)
from support.tiny_models import LANGUAGE_MODEL, llava_batch, lora_grads, tiny_llava, with_lora


def gpu(num_layers: int, fixed: float, per_layer: float, memory: float, tries: list[int]):
    """Bytes that a step takes when `count` layers are checkpointed, on a GPU of `memory` bytes."""

    def peak_with(count: int) -> float:
        tries.append(count)
        peak = fixed + per_layer * (num_layers - count)
        return peak if peak <= memory else math.inf

    return peak_with


@pytest.mark.parametrize(
    ("memory", "expected"), [(1000, 0), (420, 0), (419, 1), (300, 12), (111, 31), (100, 32)], ids=str
)
def test_fewest_layers_that_fit(memory, expected):
    tries = []
    free = (memory + 0.5) / (1 - SPARE)
    assert fewest_that_fit(gpu(32, fixed=100, per_layer=10, memory=memory, tries=tries), 32, free) == expected
    assert len(tries) <= 7


def test_all_layers_may_take_what_is_spared_else():
    assert fewest_that_fit(gpu(32, fixed=98, per_layer=10, memory=100, tries=[]), 32, 100) == 32


def test_a_try_that_does_not_fit_takes_more():
    def grows_faster_than_its_slope(count: int) -> float:
        return 100 + 10 * (32 - count) + (40 if count < 20 else 0)

    assert fewest_that_fit(grows_faster_than_its_slope, 32, 300 / (1 - SPARE)) == 16


def test_not_even_all_layers_are_enough():
    with pytest.raises(ValueError, match=r"more memory than there is.*per_device_train_batch_size"):
        fewest_that_fit(lambda count: math.inf, 32, 2**30)


def test_values_of_the_recipe():
    assert [parse_checkpoint_layers(value, 32) for value in ("auto", "all", "0", "7")] == [None, 32, 0, 7]
    for wrong in ("33", "-1", "most", "1.5"):
        with pytest.raises(ValueError, match="expected auto, all, or 0 to 32"):
            parse_checkpoint_layers(wrong, 32)


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_layers_are_computed_again_and_gradients_stay(fused):
    model = with_lora(tiny_llava(), LANGUAGE_MODEL).train()
    if fused:
        fuse_lora(model)
    model(**llava_batch(), use_cache=False).loss.backward()
    expected = lora_grads(model)
    layers = decoder_layers(model)
    assert len(layers) == 3  # and not the vision tower's
    calls = dict.fromkeys(range(3), 0)
    for index, layer in enumerate(layers):
        layer.mlp.gate_proj.register_forward_hook(lambda *_, i=index: calls.update({i: calls[i] + 1}))
    for count in range(4):
        model.zero_grad()
        checkpoint_first(model, count)
        calls.update(dict.fromkeys(calls, 0))
        model(**llava_batch(), use_cache=False).loss.backward()
        if not fused:  # the fused layer does not call the projections as modules
            assert list(calls.values()) == [2] * count + [1] * (3 - count)
        grads = lora_grads(model)
        assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_longest_rows():
    rows = [[{"role": "user", "content": "?" * length}] for length in (5, 90, 3, 40)]
    assert longest_rows(Dataset.from_dict({"messages": rows, "images": [[]] * 4}), 2) == [1, 3]
    assert longest_rows(Dataset.from_dict({"input_ids": [[1], [1, 2], []], "labels": [[1]] * 3}), 1) == [1]


def test_the_choice_is_kept_for_a_continuation(tmp_path):
    assert kept_choice(tmp_path, "auto") == "auto"
    (tmp_path / "arguments.yaml").write_text("checkpoint_layers: auto\nseed: 3\n")
    change_arguments(tmp_path, checkpoint_layers="12")
    assert yaml.safe_load((tmp_path / "arguments.yaml").read_text()) == {"checkpoint_layers": "12", "seed": 3}
    assert kept_choice(tmp_path, "auto") == "auto"  # nothing to continue from
    (tmp_path / "checkpoint-2").mkdir()
    assert kept_choice(tmp_path, "auto") == "12"
    assert kept_choice(tmp_path, "all") == "all"


@pytest.mark.parametrize(
    "optim, bytes_a_number", [("adamw_torch_fused", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 0)]
)
def test_room_is_left_for_the_optimizer(optim, bytes_a_number):
    model = torch.nn.Linear(10, 10)
    model.bias.requires_grad_(False)
    assert optimizer_state(model, SimpleNamespace(optim=SimpleNamespace(value=optim))) == 100 * bytes_a_number


@pytest.mark.parametrize("accumulated, processes, passes", [(1, 1, 1), (8, 1, 2), (2, 2, 1)])
def test_a_try_holds_the_gradients_that_wait(accumulated, processes, passes):
    args = SimpleNamespace(gradient_accumulation_steps=accumulated, world_size=processes)
    assert passes_of_a_try(args) == passes
