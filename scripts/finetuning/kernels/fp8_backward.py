"""Gradients pass through the frozen weights in FP8 (E4M3), at twice the rate of bf16 on capability 8.9 and newer.

Only the backward product grad W runs in FP8. The forward pass is what it was, in 16 bits or in INT8, and with it the loss
of given adapters. FP8 costs some precision of the gradients, far less than they differ from batch to batch. With the
forward products in FP8 too, the loss curve of a real model left bf16's by 1 to 5 % (benchmarks/README.md).
"""

from functools import partial

import torch
from torch import Tensor, nn

from finetuning.kernels.fp8 import fp8_linear, quantize_rows_to_fp8
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack
from finetuning.models.parts import base_model_of


class Fp8Weight:
    """An FP8 copy of a stack's W (out, in), one byte each, that gradients pass through.

    The gradient has a scale for each row and W one for each column, so that a large value costs its own row precision
    only. The contracted axis must be contiguous in memory: the copy is W^T.
    """

    def __init__(self, stack: ProjectionStack):
        self.stack = stack
        self.copied: Tensor | None = None

    def update(self) -> None:
        """Copy W at first use, and again when somebody moved or replaced the weights."""
        if self.copied is not self.stack.frozen.stack:
            self.copied = self.stack.frozen.stack
            self.values, self.scale = quantize_rows_to_fp8(self.stack.weight().T.contiguous())

    def add_product(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """grad_x (tokens, in) += grad W, in place; grad is (tokens, out)."""
        return grad_x.add_(fp8_linear(grad, self.values, self.scale, out_dtype=grad.dtype))


def pass_gradients_in_fp8(model: nn.Module) -> int:
    """Let every fused decoder layer of `model` (after `fuse_lora`) pass gradients down in FP8. Returns how many do.

    The copies are made in the first training pass, on the device that the weights are on by then.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    weights = []
    for stack in (stack for layer in layers for stack in projection_stacks(layer)):
        stack.fp8_weight = Fp8Weight(stack)
        weights.append(stack.fp8_weight)
    base_model_of(model).register_forward_pre_hook(partial(update_fp8_weights, weights))
    return len(layers)


def update_fp8_weights(weights: list[Fp8Weight], model: nn.Module, args: tuple) -> None:
    """Forward pre-hook of the model, so that the first step's peak of memory is that of every step."""
    if torch.is_grad_enabled():
        for weight in weights:
            weight.update()
