"""LoRA layers stacked into one product: small updates survive 16 bits, and the stack follows its weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetuning.kernels.frozen_weights import stack_by_way_of_main_memory
from finetuning.kernels.lora_projections import ProjectionStack, refresh_stacks
from support.tiny_models import (
    LANGUAGE_MODEL,
    tiny_llava,
    with_lora,
)

# What is rounded how is the library's affair that multiplies: cuBLAS rounds where the CPU does not.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.mark.parametrize("kept", ["16 bits", "fp32", "4 bits", "sharded", "4 bits, sharded"])
@pytest.mark.parametrize("device", DEVICES)
def test_small_updates_are_not_lost_to_16_bits(kept, device):
    """What the adapter adds is a thousandth of y, less than bf16 can show beside it; over many tokens it must be there."""
    torch.manual_seed(0)
    base = nn.Linear(512, 256, bias=False, dtype=torch.float32 if kept == "fp32" else torch.bfloat16)
    if "4 bits" in kept:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        packed = bitsandbytes.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
        base = bitsandbytes.nn.Linear4bit(512, 256, bias=False, compute_dtype=torch.bfloat16)
        base.weight = packed.to(device)
    base = nn.Sequential(base).to(device)
    layer = get_peft_model(base, LoraConfig(r=64, lora_alpha=32, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=3e-4)
    x = torch.randn(512, 512, device=device).to(torch.bfloat16)
    a, b = (matrix["default"].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
    taught = 0.5 * x.float() @ a.T @ b.T
    projections = ProjectionStack([layer], sharded="sharded" in kept)
    with torch.autocast(device, torch.bfloat16):
        refresh_stacks([projections])
    weight = projections.weight()
    base = x.float() @ weight.float().T
    assert 5e-4 < taught.std() / base.std() < 2e-3

    def share_that_shows(y: torch.Tensor, base=base, taught=taught) -> float:
        return ((y.float() - base) * taught).sum().item() / taught.square().sum().item()

    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        as_peft = layer(x)
    room, wide = projections.allocate_input(len(x))
    assert share_that_shows(projections.forward(x, None)[0]) == pytest.approx(1, abs=0.05)
    assert share_that_shows(projections.forward(room.copy_(x), None, wide)[0]) == pytest.approx(1, abs=0.05)
    assert share_that_shows(as_peft) < 0.7
    grad = x[:, :256]
    of_gradient = grad.float() @ weight.float(), 0.5 * grad.float() @ b @ a
    room, wide = projections.allocate_grad(len(x), None)
    for given in (
        projections.backward(room.copy_(grad), x[:, :64], None, True, wide),
        projections.backward(grad, x[:, :64], None, True),
    ):
        assert share_that_shows(given[0], *of_gradient) == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(given[1].float(), grad.float() @ b, rtol=0.02, atol=1e-3)


def test_weights_quantised_twice_are_unpacked_as_one_stack_and_stay_quantised_twice():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = bitsandbytes.functional
    torch.manual_seed(0)
    layers = []
    for rows in (128, 384):  # 256 and 768 blocks of 64 weights: whole blocks of 256 scales
        base = bitsandbytes.nn.Linear4bit(128, rows, bias=False, compute_dtype=torch.float32)
        packed, state = functional.quantize_4bit(
            torch.randn(rows, 128) * rows, quant_type="nf4", compress_statistics=True
        )
        base.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        layers.append(get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"])).base_model.model[0])
    expected = torch.cat([functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    stack = ProjectionStack(layers)
    stack.refresh(None)
    assert torch.equal(stack.weight(), expected)
    assert torch.equal(stack.frozen.weight_and_b(stack)[:, :128], expected)
    for layer in layers:
        state = layer.weight.quant_state
        assert state.nested and state.absmax.dtype == torch.uint8
        assert state.absmax.untyped_storage().data_ptr() == stack.frozen.absmax.untyped_storage().data_ptr()


def test_stack_follows_weights_that_are_replaced():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL)
    layers = [model.get_submodule(f"base_model.model.model.language_model.layers.0.self_attn.{n}_proj") for n in "qkv"]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.clone() for weight in weights]
    projections = ProjectionStack(layers)
    projections.refresh(None)
    assert projections.weight().data_ptr() == weights[0].data_ptr()
    assert all(map(torch.equal, weights, before))
    weights[1].data = torch.ones_like(weights[1])
    projections.refresh(None)
    assert projections.weight()[32:48].eq(1).all()
    assert weights[1].data_ptr() == projections.weight()[32:].data_ptr()
    model.double()
    projections.refresh(None)
    assert torch.equal(projections.weight()[:32], before[0].double())
    assert weights[1].data_ptr() == projections.weight()[32:].data_ptr()


def nf4_layers(number: int, width: int, device: str) -> nn.Module:
    """`number` pairs of NF4 layers with LoRA, which read the same activation two by two."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(2 * number):
        base = bitsandbytes.nn.Linear4bit(width, width, bias=False, compute_dtype=torch.float32)
        weight = torch.randn(width, width, device=device)
        base.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
        model.append(base)
    return get_peft_model(model, LoraConfig(r=4, target_modules=[str(index) for index in range(2 * number)]))


def test_layers_of_one_shape_keep_no_zeros_beside_b():
    pair = [nf4_layers(1, 128, "cpu").base_model.model[index] for index in (0, 1)]
    for layer in pair:
        nn.init.normal_(layer.lora_B["default"].weight)
    stack = ProjectionStack(pair)
    refresh_stacks([stack])
    assert sum(copy.numel() for copy in stack.copies) == stack.b_per_layer.numel() + stack.a.numel()
    b = torch.block_diag(*(layer.lora_B["default"].weight for layer in pair))
    joined = stack.frozen.weight_and_b(stack)
    assert torch.equal(joined, torch.cat([stack.weight(), b], dim=1))
    x, x_a = torch.randn(3, 256), torch.randn(3, 8)
    torch.testing.assert_close(stack.add_low_rank(x.clone(), x_a), x + x_a @ b.T)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_stacks_leave_no_holes_in_the_memory_of_a_gpu():
    model = nf4_layers(40, 4096, "cuda")
    pairs = [model.base_model.model[index : index + 2] for index in range(0, 80, 2)]
    stacks = [ProjectionStack(list(pair)) for pair in pairs]
    expected = stacks[7].layers[0].get_base_layer().weight.data.clone()
    stack_by_way_of_main_memory([stack.frozen for stack in stacks])
    assert torch.equal(stacks[7].layers[0].get_base_layer().weight.data, expected)
    refresh_stacks(stacks)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < 1.1 * torch.cuda.memory_allocated()
