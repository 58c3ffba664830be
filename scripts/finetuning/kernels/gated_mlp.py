"""SwiGLU and GeGLU (arXiv 2002.05202), the gated activations of Llama's and Gemma's MLP, forward and backward.

Liger-Kernel has both too, but writes dense rows. Here `out` may be rows with room for LoRA's low-rank columns, so that
the next product needs no copy.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton, upcast

GELU_TANH = 0.7978845608028654  # sqrt(2 / pi)


def gated_activation(gate_up: Tensor, is_gelu: bool, out: Tensor) -> Tensor:
    """gate_up (rows, 2 * width), gate first -> silu(gate) * up, or Gemma's tanh-approximated gelu(gate) * up.

    Written into `out` (rows, width), in its dtype; its stride is (any, 1). Returns `out`.
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
    """`grad` (rows, width) of the output -> gradient of `gate_up`, written into `out` (rows, 2 * width).

    The stride of `out` is (any, 1). Returns the output of the forward pass (rows, width), recomputed.
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
    grad_fp32 = upcast(grad)
    out.copy_(torch.cat([grad_fp32 * up * slope, grad_fp32 * activated], dim=-1))
    return (activated * up).to(gate_up.dtype)


if triton is not None:

    @triton.jit
    def activation_and_slope(gate, IS_GELU: tl.constexpr):
        """activation(gate) and its derivative."""
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
        mask = columns < width
        gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=mask, other=0.0).to(tl.float32)
        activated, _ = activation_and_slope(gate, IS_GELU)
        tl.store(activated_ptr + row * activated_stride + columns, activated * up, mask=mask)

    @triton.jit
    def gated_activation_backward_kernel(
        gate_up_ptr, grad_ptr, out_ptr, activated_ptr, width, out_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < width
        gate_offsets = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + gate_offsets, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_offsets + width, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        activated, slope = activation_and_slope(gate, IS_GELU)
        tl.store(out_ptr + row * out_stride + columns, grad * up * slope, mask=mask)
        tl.store(out_ptr + row * out_stride + width + columns, grad * activated, mask=mask)
        tl.store(activated_ptr + row * width + columns, activated * up, mask=mask)
