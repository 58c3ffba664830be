"""Frozen base weights in FP8 (E4M3): twice the rate of bf16 on the matrix units of capability 8.9 and newer.

Each row of the left operand and each column of the right one has its own scale, so one large value costs the precision
of its row only. Both directions need the contracted axis contiguous in memory: the weights are held twice, one byte
each, as much as bf16. The adapters' own products stay in 16 bits.

Measured by train_speed.py only: no recipe offers it, because its loss was not followed over a whole run.
"""

import torch
from torch import Tensor, nn

from finetuning.fused_lora import FusedDecoderLayer
from finetuning.layer_kernels import quantize_rows


class Fp8Weight:
    """A frozen weight (out, in) for the products of both directions."""

    def __init__(self, weight: Tensor):
        self.by_output, self.output_scale = quantize_rows(weight)
        self.by_input, self.input_scale = quantize_rows(weight.T.contiguous())

    def add_product(self, y: Tensor, x: Tensor) -> Tensor:
        """y (tokens, out) + x W^T, x (tokens, in)"""
        return y.add_(scaled_product(x, self.by_output, self.output_scale))

    def add_transposed_product(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """grad_x (tokens, in) + grad W, grad (tokens, out)"""
        return grad_x.add_(scaled_product(grad, self.by_input, self.input_scale))


def scaled_product(left: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    values, scale = quantize_rows(left)
    return torch._scaled_mm(
        values, right.T, scale_a=scale, scale_b=right_scale.T, out_dtype=left.dtype, use_fast_accum=True
    )


def hold_base_in_fp8(model: nn.Module) -> int:
    """Give every fused decoder layer an FP8 copy of its frozen weights. Returns how many layers have one."""
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    for layer in layers:
        for projections in (layer.fused_qkv, layer.fused_o, layer.fused_gate_up, layer.fused_down):
            projections.leaves_room = False  # B would be columns of a product that is replaced here
            projections.refresh(None)
            held = Fp8Weight(projections.weight())
            projections.add_product = held.add_product
            projections.add_transposed_product = held.add_transposed_product
    return len(layers)
