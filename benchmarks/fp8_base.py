"""Forward products with the frozen weights in FP8 too, beside the gradients that a recipe's `base_precision` passes so.

Measured by train_speed.py only, no recipe offers it: on a real model the loss left that of bf16 (README.md, "FP8").
"""

from functools import partial

import torch
from torch import Tensor, nn

from finetuning.kernels.dropout import hashed_dropout
from finetuning.kernels.fp8 import fp8_linear, quantize_rows_to_fp8
from finetuning.kernels.fp8_backward import pass_gradients_in_fp8
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack


def hold_base_in_fp8(model: nn.Module) -> int:
    """Give every fused decoder layer two FP8 copies of its frozen weights. Returns how many layers have them."""
    for layer in (module for module in model.modules() if isinstance(module, FusedDecoderLayer)):
        for stack in projection_stacks(layer):
            stack.refresh(None)
            stack.forward = partial(forward, stack, *quantize_rows_to_fp8(stack.weight().contiguous()))
    return pass_gradients_in_fp8(model)


def forward(
    stack: ProjectionStack, values: Tensor, scale: Tensor, x: Tensor, seeds: Tensor | None, _room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ProjectionStack.forward`, the sum rounded once: two roundings lose small updates, and learning lags.

    In fp32 the product with scales for rows is cuBLAS's alone, on capability 9.0 (CUDA 12.9 and newer).
    """
    x_a = torch.mm(x if seeds is None else hashed_dropout(x, seeds, stack.dropout), stack.a.T)
    y = torch.mm(x_a, stack.b.T)
    return torch.add(y, fp8_linear(x, values, scale, out_dtype=torch.float32), out=y), x_a
