"""RMSNorm of Llama and Gemma (arXiv 1910.07467), forward and backward, each in one pass over memory.

Liger-Kernel has one too, but writes dense rows. Here `out` may be rows with room for LoRA's low-rank columns, so that
the next product needs no copy.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton, upcast


def rms_norm(hidden: Tensor, weight: Tensor, offset: float, eps: float, out: Tensor) -> Tensor:
    """hidden (rows, width), contiguous -> hidden / rms(hidden) * (offset + weight); Gemma's offset is 1, Llama's 0.

    Written into `out` (rows, width), in its dtype; its stride is (any, 1). Returns `out`.
    """
    if runs_triton(hidden):
        rows, width = hidden.shape
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](
            hidden, weight, out, width, out.stride(0), offset, eps, BLOCK=block, num_warps=warps_for(block)
        )
        return out
    hidden_fp32 = upcast(hidden)
    normed = hidden_fp32 * torch.rsqrt(hidden_fp32.square().mean(-1, keepdim=True) + eps)
    return out.copy_(normed * (offset + upcast(weight)))


def rms_norm_backward(
    hidden: Tensor, weight: Tensor, offset: float, eps: float, grad: Tensor, grad_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients -> gradient of `hidden`, through the norm plus `grad_residual`; and the norm's output, recomputed.

    All tensors are (rows, width). The first has the dtype of `hidden`, the second that of `grad`.
    """
    if runs_triton(hidden):
        rows, width = hidden.shape
        block = triton.next_power_of_2(width)
        grad_hidden, normed = torch.empty_like(hidden), torch.empty_like(grad)
        rms_norm_backward_kernel[(rows,)](
            hidden, weight, grad, grad_residual.contiguous(), grad_hidden, normed, width, offset, eps,
            BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
        return grad_hidden, normed
    hidden_fp32 = upcast(hidden)
    scale = offset + upcast(weight)
    inverse_rms = torch.rsqrt(hidden_fp32.square().mean(-1, keepdim=True) + eps)
    normed = hidden_fp32 * inverse_rms
    scaled = upcast(grad) * scale
    grad_normed = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (grad_normed + upcast(grad_residual)).to(hidden.dtype), (normed * scale).to(grad.dtype)


def warps_for(block: int) -> int:
    """One for each 256 numbers, at most 8: rows of a head's width are many, and most of larger programs would wait."""
    return max(1, min(8, block // 256))


if triton is not None:

    @triton.jit
    def rms_norm_kernel(hidden_ptr, weight_ptr, normed_ptr, width, normed_stride, offset, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        mask = columns < width
        hidden = tl.load(hidden_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms * (offset + weight)
        tl.store(normed_ptr + row * normed_stride + columns, normed, mask=mask)

    @triton.jit
    def rms_norm_backward_kernel(
        hidden_ptr, weight_ptr, grad_ptr, grad_residual_ptr, grad_hidden_ptr, normed_ptr, width, offset, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        mask = columns < width
        offsets = row * width + columns
        hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = offset + tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        scaled = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        residual = tl.load(grad_residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms
        grad_normed = inverse_rms * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
        tl.store(grad_hidden_ptr + offsets, grad_normed + residual, mask=mask)
        tl.store(normed_ptr + offsets, normed * scale, mask=mask)
