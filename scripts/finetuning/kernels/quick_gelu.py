"""QuickGELU, CLIP's activation, for a frozen vision tower: forward only, in one pass over memory."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton


def quick_gelu(hidden: Tensor) -> Tensor:
    """hidden * sigmoid(1.702 hidden), of any shape, rounded after each of its three steps as inference rounds it.

    The Triton kernel passes no gradient.
    """
    if runs_triton(hidden):
        hidden = hidden.contiguous()
        activated = torch.empty_like(hidden)
        quick_gelu_kernel[(triton.cdiv(hidden.numel(), 2048),)](hidden, activated, hidden.numel(), BLOCK=2048)
        return activated
    return hidden * torch.sigmoid(1.702 * hidden)


if triton is not None:

    @triton.jit
    def quick_gelu_kernel(hidden_ptr, activated_ptr, size, BLOCK: tl.constexpr):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0)
        scaled = (1.702 * hidden.to(tl.float32)).to(hidden.dtype)
        sigmoid = tl.sigmoid(scaled.to(tl.float32)).to(hidden.dtype)
        tl.store(activated_ptr + offsets, hidden.to(tl.float32) * sigmoid.to(tl.float32), mask=mask)
