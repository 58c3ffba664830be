"""Gradients pass through the frozen weights in FP8 (E4M3): twice the rate of bf16 on the units of capability 8.9 and newer.

Of the two products with a frozen weight, only the backward one, grad W, is computed so. The forward pass stays what it is,
and with it the loss of given adapters: what FP8 takes away is some precision of gradients, which differ from batch to batch
by far more. With the forward products in FP8 too, the loss curve of a real model left bf16's by 1 to 5 % (benchmarks/README.md).
"""

from functools import partial

import torch
from torch import Tensor, nn

from finetuning.kernels.fp8 import fp8_linear, quantize_rows_to_fp8
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack
from finetuning.models.parts import base_model_of


class Fp8Weight:
    """W (out, in) of stacked frozen layers, a second time in FP8, one byte each, for the gradients that W passes down.

    A scale for each row of the gradient and for each column of W: one large value costs the precision of its row only.
    The contracted axis must be contiguous in memory, so what is held is W^T.
    """

    def __init__(self, stack: ProjectionStack):
        self.stack = stack
        self.copied: Tensor | None = None

    def update(self) -> None:
        """Copy the stack's weights, if they are not those that were copied: first use, or somebody moved them."""
        if self.copied is not self.stack.stack:
            self.copied = self.stack.stack
            self.values, self.scale = quantize_rows_to_fp8(self.stack.weight().T.contiguous())

    def add_transposed_product(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """grad_x (tokens, in) + grad W, in place; grad is (tokens, out)."""
        return grad_x.add_(fp8_linear(grad, self.values, self.scale, out_dtype=grad.dtype))


def pass_gradients_in_fp8(model: nn.Module) -> int:
    """Let every fused decoder layer of `model` (after `fuse_lora`) pass gradients down in FP8. Returns how many do.

    The copies are made in the first training pass, on the device that the weights have come to.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    held = [Fp8Weight(stack) for layer in layers for stack in projection_stacks(layer)]
    for weight in held:
        weight.stack.add_transposed_product = weight.add_transposed_product
        weight.stack.gradient_in_one = False
    base_model_of(model).register_forward_pre_hook(partial(update_fp8_copies, held))
    return len(layers)


def update_fp8_copies(held: list[Fp8Weight], model: nn.Module, args: tuple) -> None:
    # Before the forward pass and not where they are needed, so that the first step's peak of memory is that of all steps.
    if torch.is_grad_enabled():
        for weight in held:
            weight.update()
