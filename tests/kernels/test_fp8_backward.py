"""Gradients through the frozen weights in FP8: what is multiplied, that the loss stays, and how far gradients move."""

import pytest
import torch
from conftest import ROOT
from torch import nn

from finetuning.arguments import parse_arguments
from finetuning.kernels.fp8 import quantize_rows_to_fp8
from finetuning.kernels.fp8_backward import pass_gradients_in_fp8
from finetuning.kernels.lora_layers import fuse_lora
from support.tiny_models import (
    DECODER,
    LANGUAGE_MODEL,
    llava_batch,
    loss_and_grads,
    relative_error,
    tiny_gemma,
    tiny_llava,
    with_lora,
)


def text_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(3, 99, (2, 20))
    return {"input_ids": input_ids, "labels": input_ids}


def fused(make, targets: str) -> nn.Module:
    """In bf16 with fp32 adapters, as the recipes train."""
    model = with_lora(make().bfloat16(), targets).train()
    assert fuse_lora(model) == 21
    return model


@pytest.mark.parametrize(
    ("make", "targets", "batch"),
    [(tiny_llava, LANGUAGE_MODEL, llava_batch), (tiny_gemma, DECODER, text_batch)],
    ids=["llava", "gemma"],
)
def test_the_loss_stays_and_gradients_move_by_what_fp8_rounds(make, targets, batch):
    model = fused(make, targets)
    loss, grads = loss_and_grads(model, batch())
    assert pass_gradients_in_fp8(model) == 3
    loss_in_fp8, grads_in_fp8 = loss_and_grads(model, batch())
    assert loss_in_fp8 == loss
    assert len(grads) == 42
    errors = {name: relative_error(grads_in_fp8[name], grads[name]) for name in grads}
    # No frozen weight lies between the loss and the last projection; between the loss and each other one at least one does.
    last = [name for name in errors if "layers.2.mlp.down_proj" in name]
    assert [errors.pop(name) for name in last] == [0.0, 0.0]
    assert min(errors.values()) > 0.02 and max(errors.values()) < 0.2, errors

    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_again, grads_again = loss_and_grads(model, batch())
    assert loss_again == loss
    assert all(torch.equal(grads_again[name], grads_in_fp8[name]) for name in grads)


def test_what_is_multiplied():
    model = fused(tiny_gemma, DECODER)
    pass_gradients_in_fp8(model)
    model(**text_batch(), use_cache=False)
    stack = model.get_base_model().model.layers[1].fused_gate_up
    torch.manual_seed(0)
    grad, grad_x = torch.randn(7, 96).bfloat16(), torch.randn(7, 32).bfloat16()
    given = stack.add_grad_through_weight(grad_x.clone(), grad)
    rounded = [
        values.float() * scale for values, scale in map(quantize_rows_to_fp8, (grad, stack.weight().T.contiguous()))
    ]
    torch.testing.assert_close(given, grad_x + (rounded[0] @ rounded[1].T).bfloat16(), rtol=2**-7, atol=0.02)
    # Four bits of precision in each factor: 2.6 % of each number, on average.
    product = grad.float() @ stack.weight().float()
    assert 0.02 < relative_error(rounded[0] @ rounded[1].T, product) < 0.06
    assert relative_error(given - grad_x, product) < 0.06


def test_copies_follow_weights_that_are_replaced_and_wait_for_training():
    model = fused(tiny_gemma, DECODER)
    pass_gradients_in_fp8(model)
    layer = model.get_base_model().model.layers[1]
    with torch.no_grad():
        model(**text_batch(), use_cache=False)
    grad = torch.randn(7, 32).bfloat16()
    with pytest.raises(AttributeError):  # none was made for a pass without gradients
        layer.fused_down.add_grad_through_weight(torch.zeros(7, 48).bfloat16(), grad)
    model(**text_batch(), use_cache=False)
    before = layer.fused_down.add_grad_through_weight(torch.zeros(7, 48).bfloat16(), grad)
    weight = layer.mlp.down_proj.get_base_layer().weight
    weight.data = 2 * weight.data
    model(**text_batch(), use_cache=False)
    after = layer.fused_down.add_grad_through_weight(torch.zeros(7, 48).bfloat16(), grad)
    assert torch.equal(after, 2 * before)


def test_a_recipe_may_say_fp8_backward_or_int8_and_nothing_else():
    recipe = ROOT / "scripts" / "configs" / "llava_lora.yaml"
    words = ["--config", str(recipe), "--base_precision"]
    assert parse_arguments(recipe, [*words, "fp8_backward"])[0].base_precision == "fp8_backward"
    assert parse_arguments(recipe, [*words, "int8"])[0].base_precision == "int8"
    assert parse_arguments(recipe, words[:2])[0].base_precision is None
    with pytest.raises(ValueError, match="invalid choice: 'fp8'"):
        parse_arguments(recipe, [*words, "fp8"])
