"""Dropout whose mask is a hash of position and seed: nothing is kept for the backward pass."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton

MIX = 0x45D9F3B  # multiplier of Thomas Mueller's 32-bit integer hash


def hashed_dropout(tensor: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the others by 1 / (1 - probability).

    `tensor` is (rows, width), its rows may lie apart (stride (any, 1)). The mask is a hash of the element's row and
    column and two 31-bit `seeds`, so it costs no memory: the same seeds give the same mask in the backward pass.
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
    mixed = (torch.arange(tensor.numel(), device=tensor.device) + seeds[0]) & low_32_bits
    for step in range(4):
        if step == 2:
            mixed = mixed ^ seeds[1]
        mixed = ((mixed ^ (mixed >> 16)) * MIX) & low_32_bits
    mixed = (mixed ^ (mixed >> 16)) >> 1
    return torch.where(mixed.view_as(tensor) >= int(probability * 2**31), tensor * (1 / (1 - probability)), 0)


if triton is not None:

    @triton.jit
    def hashed_dropout_kernel(tensor_ptr, seeds_ptr, dropped_ptr, width, stride, threshold, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        places = row * width + columns
        mixed = (places + tl.load(seeds_ptr)).to(tl.uint32)
        second_seed = tl.load(seeds_ptr + 1).to(tl.uint32)
        for step in tl.static_range(4):
            if step == 2:
                mixed = mixed ^ second_seed
            mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B
        mixed = (mixed ^ (mixed >> 16)) >> 1
        values = tl.load(tensor_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        kept = tl.where(mixed.to(tl.int32) >= threshold, values * scale, 0.0)
        tl.store(dropped_ptr + places, kept, mask=inside)
