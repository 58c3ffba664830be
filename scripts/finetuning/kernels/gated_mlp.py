"""SwiGLU and GeGLU, the gated activations of Llama's and Gemma's MLP, forward and backward.

Not Liger-Kernel's: the output goes into rows that have room for the low-rank columns of LoRA behind them.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton, upcast

GELU_TANH = 0.7978845608028654  # sqrt(2 / pi)


def gated_activation(gate_up: Tensor, is_gelu: bool, out: Tensor) -> Tensor:
    """(rows, [gate, up]) -> silu(gate) * up, or Gemma's tanh-approximated gelu(gate) * up.

    Written into `out` (rows, width), whose rows may lie apart (stride (any, 1)).
    """
    if runs_triton(gate_up):
        rows, width = out.shape
        gated_activation_kernel[(rows, triton.cdiv(width, 1024))](
            gate_up, out, width, out.stride(0), IS_GELU=is_gelu, BLOCK=1024
        )
        return out
    gate, up = upcast(gate_up).chunk(2, dim=-1)
    if is_gelu:
        activated = 0.5 * gate * (1 + torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate)))
    else:
        activated = gate * torch.sigmoid(gate)
    return out.copy_(activated * up)


def gated_activation_backward(gate_up: Tensor, grad: Tensor, is_gelu: bool, out: Tensor) -> Tensor:
    """The activation's output once more; the gradient of the stacked [gate, up] is written into `out`.

    The rows of `out` may lie apart (stride (any, 1)).
    """
    if runs_triton(gate_up):
        rows, width = grad.shape
        activated = torch.empty_like(grad)
        gated_activation_backward_kernel[(rows, triton.cdiv(width, 1024))](
            gate_up, grad, out, activated, width, out.stride(0), IS_GELU=is_gelu, BLOCK=1024
        )
        return activated
    gate, up = upcast(gate_up).chunk(2, dim=-1)
    if is_gelu:
        tanh = torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate))
        activated = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * GELU_TANH * (1 + 3 * 0.044715 * gate * gate)
    else:
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    wide = upcast(grad)
    out.copy_(torch.cat([wide * up * slope, wide * activated], dim=-1))
    return (activated * up).to(gate_up.dtype)


if triton is not None:

    @triton.jit
    def activation(gate, IS_GELU: tl.constexpr):
        """Activated gate and the slope there."""
        if IS_GELU:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            tanh = 2 * tl.sigmoid(2 * inner) - 1
            activated = 0.5 * gate * (1 + tanh)
            inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
            slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * inner_slope
        else:
            sigmoid = tl.sigmoid(gate)
            activated = gate * sigmoid
            slope = sigmoid * (1 + gate * (1 - sigmoid))
        return activated, slope

    @triton.jit
    def gated_activation_kernel(
        gate_up_ptr, activated_ptr, width, activated_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
        activated, _ = activation(gate, IS_GELU)
        tl.store(activated_ptr + row * activated_stride + columns, activated * up, mask=inside)

    @triton.jit
    def gated_activation_backward_kernel(
        gate_up_ptr, grad_ptr, out_ptr, activated_ptr, width, out_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        gate_place = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_place + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        activated, slope = activation(gate, IS_GELU)
        tl.store(out_ptr + row * out_stride + columns, grad * up * slope, mask=inside)
        tl.store(out_ptr + row * out_stride + width + columns, grad * activated, mask=inside)
        tl.store(activated_ptr + row * width + columns, activated * up, mask=inside)
