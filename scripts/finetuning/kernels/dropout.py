"""Dropout whose mask is a hash of position and seeds, so that no mask is kept for the backward pass."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton

HASH_MULTIPLIER = 0x45D9F3B  # multiplier of Thomas Mueller's 32-bit integer hash


def hashed_dropout(tensor: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Zero each element of `tensor` (rows, width) with `probability`, and scale the others by 1 / (1 - probability).

    `tensor` has stride (any, 1). `seeds` are two 31-bit integers, (2,); the same seeds give the same mask.
    """
    if runs_triton(tensor):
        rows, width = tensor.shape
        dropped = tensor.new_empty(rows, width)
        threshold = int(probability * 2**31)
        hashed_dropout_kernel[(rows, triton.cdiv(width, 1024))](
            tensor, seeds, dropped, width, tensor.stride(0), threshold, 1 / (1 - probability), BLOCK=1024
        )
        return dropped
    low_32_bits = 0xFFFFFFFF
    hashed = (torch.arange(tensor.numel(), device=tensor.device) + seeds[0]) & low_32_bits
    for step in range(4):
        if step == 2:
            hashed = hashed ^ seeds[1]
        hashed = ((hashed ^ (hashed >> 16)) * HASH_MULTIPLIER) & low_32_bits
    hashed = (hashed ^ (hashed >> 16)) >> 1
    return torch.where(hashed.view_as(tensor) >= int(probability * 2**31), tensor * (1 / (1 - probability)), 0)


if triton is not None:

    @triton.jit
    def hashed_dropout_kernel(tensor_ptr, seeds_ptr, dropped_ptr, width, stride, threshold, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = columns < width
        offsets = row * width + columns
        hashed = (offsets + tl.load(seeds_ptr)).to(tl.uint32)
        second_seed = tl.load(seeds_ptr + 1).to(tl.uint32)
        for step in tl.static_range(4):
            if step == 2:
                hashed = hashed ^ second_seed
            hashed = (hashed ^ (hashed >> 16)) * 0x45D9F3B
        hashed = (hashed ^ (hashed >> 16)) >> 1
        values = tl.load(tensor_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
        kept = tl.where(hashed.to(tl.int32) >= threshold, values * scale, 0.0)
        tl.store(dropped_ptr + offsets, kept, mask=mask)
