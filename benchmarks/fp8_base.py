"""Forward products with the frozen weights in FP8 too, beside the gradients that a recipe's `base_precision` passes so.

Measured by train_speed.py only, no recipe offers it: on a real model the loss left that of bf16 (README.md, "Tried").
"""

from functools import partial

import torch
from torch import Tensor, nn

from finetuning.fp8_base import pass_gradients_in_fp8, scaled_product
from finetuning.fused_lora import FusedDecoderLayer
from finetuning.gathered import projections
from finetuning.layer_kernels import quantize_rows


def hold_base_in_fp8(model: nn.Module) -> int:
    """Give every fused decoder layer two FP8 copies of its frozen weights. Returns how many layers have them."""
    for layer in (module for module in model.modules() if isinstance(module, FusedDecoderLayer)):
        for stack in projections(layer):
            stack.leaves_room = False  # B would be columns of a product that is replaced here
            stack.refresh(None)
            stack.add_product = partial(add_product, *quantize_rows(stack.weight()))
    return pass_gradients_in_fp8(model)


def add_product(values: Tensor, scale: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """y (tokens, out) + x W^T, x (tokens, in), rounded once: two roundings lose small updates, and learning lags.

    In fp32 the product with scales for rows is cuBLAS's alone, on capability 9.0 (CUDA 12.9 and newer).
    """
    return torch.add(y, scaled_product(x, values, scale, out_dtype=torch.float32), out=y)
