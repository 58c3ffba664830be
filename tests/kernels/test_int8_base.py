"""The frozen weights in INT8: what is multiplied, that the loss stays, how far gradients move, and what reads the layers."""

import pytest
import torch
from torch import nn

from finetuning.evaluation.answering import AskedModels
from finetuning.inference.packed_decoder import Linears, compute_dtype
from finetuning.kernels.fp8_backward import pass_gradients_in_fp8
from finetuning.kernels.int8 import dequantize_rows
from finetuning.kernels.int8_base import (
    Int8Linear,
    hold_base_in_int8,
    refuse_base_precision,
    refuse_int8_layers,
    set_base_precision,
)
from finetuning.kernels.lora_layers import fuse_lora, projection_stacks
from finetuning.kernels.lora_projections import refresh_stacks
from finetuning.models.parts import count_parameters
from support.tiny_models import (
    DECODER,
    LANGUAGE_MODEL,
    llava_batch,
    loss_and_grads,
    relative_error,
    text_batch,
    tiny_gemma,
    tiny_llava,
    with_lora,
)

WIDE = {"hidden_size": 256, "intermediate_size": 384, "initializer_range": 0.05}


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16, **lora) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """With LoRA and in `dtype`, adapters in fp32; and a batch."""
    if kind == "llava":
        return with_lora(tiny_llava(**WIDE).to(dtype), LANGUAGE_MODEL, **lora).train(), llava_batch()
    return with_lora(tiny_gemma(head_dim=128, **WIDE).to(dtype), DECODER, **lora).train(), text_batch()


def fused_in_int8(kind: str, **settings) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, batch = model_of(kind, **settings)
    assert hold_base_in_int8(model) == 21
    assert fuse_lora(model) == 21
    assert pass_gradients_in_fp8(model) == 3
    return model, batch


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["llava", "gemma"])
def test_the_loss_stays_and_gradients_move_by_what_8_bits_round(kind, dropout):
    model, batch = model_of(kind, torch.float32, lora_dropout=dropout)
    fuse_lora(model)
    torch.manual_seed(2)
    loss, grads = loss_and_grads(model, batch)
    counted = count_parameters(model)
    model, batch = fused_in_int8(kind, dtype=torch.float32, lora_dropout=dropout)
    torch.manual_seed(2)
    loss_in_int8, grads_in_int8 = loss_and_grads(model, batch)
    assert loss_in_int8 == pytest.approx(loss, rel=2e-3) and loss_in_int8 != loss
    assert grads.keys() == grads_in_int8.keys() and len(grads) == 42
    errors = [relative_error(grads_in_int8[name], grads[name]) for name in grads]
    assert min(errors) > 1e-4 and max(errors) < 0.2, errors
    assert count_parameters(model) == counted

    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    loss_again, grads_again = loss_and_grads(model, batch)
    assert loss_again == loss_in_int8
    assert all(torch.equal(grads_again[name], grads_in_int8[name]) for name in grads)


def test_no_16_bit_weight_of_the_decoder_stays_and_scales_are_never_rounded():
    model, _ = fused_in_int8("llava")
    layers = model.get_base_model().model.language_model.layers
    bases = [module for module in layers.modules() if hasattr(module, "base_layer")]
    assert len(bases) == 21 and all(type(module.base_layer) is Int8Linear for module in bases)
    frozen = [parameter for parameter in layers.parameters() if not parameter.requires_grad and parameter.dim() == 2]
    assert {parameter.dtype for parameter in frozen} == {torch.int8}
    scale = bases[0].base_layer.scale.clone()
    model.bfloat16()  # as DeepSpeed does
    assert torch.equal(bases[0].base_layer.scale, scale) and compute_dtype(bases[0]) == torch.bfloat16


def test_products_that_are_kept_stay_in_16_bits_and_both_kinds_train():
    model, batch = model_of("gemma")
    assert hold_base_in_int8(model, keep=["1.gate_up", "2.qkv"]) == 21 - 5
    fuse_lora(model)
    loss_and_grads(model, batch)
    layers = model.get_base_model().model.layers
    kinds = [[stack.frozen.weight(stack).dtype for stack in projection_stacks(layer)] for layer in layers]
    assert kinds == [[torch.bfloat16] * 4] * 3
    named = [[type(stack.frozen).__name__ for stack in projection_stacks(layer)] for layer in layers]
    int8, dense = "Int8Weights", "DenseWeights"
    assert named == [[int8] * 4, [int8, int8, dense, int8], [dense, int8, int8, int8]]


@torch.no_grad()
def test_answers_multiply_what_training_does_with_the_adapter_and_without():
    model, batch = fused_in_int8("llava")
    model.eval()
    layer = model.get_base_model().model.language_model.layers[1]
    stack = layer.fused_gate_up
    refresh_stacks([stack])
    linears = Linears([layer.mlp.gate_proj, layer.mlp.up_proj], stack, torch.bfloat16)
    x = torch.randn(9, 256).bfloat16()
    given = linears(*[linears.new_input(9, 256, x.device)[0].copy_(x)])
    assert torch.equal(given, stack.forward(x, None)[0])
    with model.disable_adapter():
        stack.follow_switch()
        alone = linears(x)
        assert torch.equal(
            alone, torch.cat([proj.base_layer(x) for proj in (layer.mlp.gate_proj, layer.mlp.up_proj)], 1)
        )
        # PEFT's own code, as `generate` with a cache runs it
        assert torch.equal(layer.mlp.up_proj(x), alone[:, 384:])
    stack.follow_switch()
    residual = torch.randn(9, 256).bfloat16()
    down = Linears([layer.mlp.down_proj], layer.fused_down, torch.bfloat16)
    refresh_stacks([layer.fused_down])
    wide = torch.randn(9, 384).bfloat16()
    added = down.add_to(residual.clone(), wide)
    assert relative_error(added.float(), (down(wide) + residual).float()) < 0.004
    assert torch.isfinite(model(**batch, use_cache=False).logits).all()


def test_outside_of_fused_layers_a_gradient_passes_through_the_weights_as_they_are():
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(40, 128), nn.Parameter(torch.randn(40), requires_grad=False))
    x = torch.randn(3, 5, 128, requires_grad=True)
    linear(x).sum().backward()
    weight = dequantize_rows(linear.weight, linear.scale, torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
    with torch.no_grad():
        assert relative_error(linear(x), x @ weight.T + linear.bias) < 0.01


def test_4_bit_weights_are_held_as_what_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is for Linux")
    model = tiny_llava(**WIDE)
    layer = model.model.language_model.layers[0]
    weight = layer.mlp.up_proj.weight.data
    quantised = bitsandbytes.nn.Linear4bit(256, 384, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    quantised.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.mlp.up_proj = quantised.to("cpu")
    x = torch.randn(4, 256)
    expected = layer.mlp.up_proj(x)
    assert hold_base_in_int8(model) == 21
    with torch.no_grad():
        assert relative_error(layer.mlp.up_proj(x), expected) < 0.02
        assert relative_error(layer.mlp.up_proj(x), x @ weight.T) > 0.03  # what NF4 has lost stays lost


def test_a_cpu_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"int8 was made for GPUs of .* 9\.0 .*, and this is the CPU: leave it out"):
        refuse_base_precision("int8")
    with pytest.raises(ValueError, match="this is the CPU"):
        AskedModels(tmp_path / "no-run", "no-base", "int8")
    with pytest.raises(ValueError, match="this is the CPU"):
        set_base_precision(tiny_llava(**WIDE), "int8", tmp_path)


def test_a_gpu_of_another_capability_is_refused_with_its_name_and_what_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ValueError, match=r"9\.0 \(H100, H200\), and this is NVIDIA L4, of 8\.9: leave it out"):
        refuse_base_precision("int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refuse_base_precision("int8")
    refuse_base_precision(None)


def test_sizes_that_the_product_cannot_have_are_refused():
    with pytest.raises(ValueError, match=r"adapters of rank 8 and multiples, not \[4\]"):
        refuse_int8_layers(model_of("llava")[0])
    with pytest.raises(ValueError, match=r"layers of width 128 and multiples, not \[320\]"):
        refuse_int8_layers(tiny_llava(**WIDE | {"intermediate_size": 320}))
    refuse_int8_layers(tiny_llava(**WIDE))
