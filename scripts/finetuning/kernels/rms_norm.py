"""RMSNorm of Llama and Gemma, forward and backward, in one pass over memory each.

Not Liger-Kernel's: the output goes into rows that have room for the low-rank columns of LoRA behind them.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton, upcast


def rms_norm(hidden: Tensor, weight: Tensor, offset: float, eps: float, out: Tensor) -> Tensor:
    """(rows, width) -> hidden / rms(hidden) * (offset + weight); Gemma's offset is 1, Llama's 0.

    Written into `out` of the same shape, whose rows may lie apart (stride (any, 1)), in its type.
    """
    if runs_triton(hidden):
        rows, width = hidden.shape
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](hidden, weight, out, width, out.stride(0), offset, eps, BLOCK=block, num_warps=8)
        return out
    wide = upcast(hidden)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out.copy_(normed * (offset + upcast(weight)))


def rms_norm_backward(
    hidden: Tensor, weight: Tensor, offset: float, eps: float, grad: Tensor, grad_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `hidden` through the norm and past it, and the norm's output once more (in the type of `grad`)."""
    if runs_triton(hidden):
        rows, width = hidden.shape
        grad_hidden, normed = torch.empty_like(hidden), torch.empty_like(grad)
        rms_norm_backward_kernel[(rows,)](
            hidden, weight, grad, grad_residual.contiguous(), grad_hidden, normed, width, offset, eps,
            BLOCK=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
        return grad_hidden, normed
    wide = upcast(hidden)
    scale = offset + upcast(weight)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse_rms
    scaled = upcast(grad) * scale
    through = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (through + upcast(grad_residual)).to(hidden.dtype), (normed * scale).to(grad.dtype)


if triton is not None:

    @triton.jit
    def rms_norm_kernel(hidden_ptr, weight_ptr, normed_ptr, width, normed_stride, offset, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        hidden = tl.load(hidden_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms * (offset + weight)
        tl.store(normed_ptr + row * normed_stride + columns, normed, mask=inside)

    @triton.jit
    def rms_norm_backward_kernel(
        hidden_ptr, weight_ptr, grad_ptr, grad_residual_ptr, grad_hidden_ptr, normed_ptr, width, offset, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        places = row * width + columns
        hidden = tl.load(hidden_ptr + places, mask=inside, other=0.0).to(tl.float32)
        scale = offset + tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32) * scale
        residual = tl.load(grad_residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms
        through = inverse_rms * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
        tl.store(grad_hidden_ptr + places, through + residual, mask=inside)
        tl.store(normed_ptr + places, normed * scale, mask=inside)
