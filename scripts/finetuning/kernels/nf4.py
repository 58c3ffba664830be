"""Dequantization of bitsandbytes' 4-bit weights (NF4, FP4; arXiv 2305.14314).

The values are those of bitsandbytes' own kernel, which writes dense rows only. Here `out` may be rows with room for
LoRA's low-rank columns, so that the product needs no copy.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton


def dequantize_4bit(packed: Tensor, scales: Tensor, code: Tensor, block_size: int, out: Tensor) -> Tensor:
    """Dequantize `packed` into `out` (rows, even width), of stride (any, 1); returns `out`.

    `packed` has two 4-bit indices a byte, the first in the upper half. Element i of `out` is
    code[index i] * scales[i // block_size], with `code` (16,) and `scales` (blocks,) in fp32.
    """
    packed = packed.flatten().view(torch.uint8)
    if runs_triton(packed):
        rows, width = out.shape
        dequantize_4bit_kernel[(rows, triton.cdiv(width, 2048))](
            packed, scales, code, out, width, out.stride(0), BLOCK_SIZE=block_size, BLOCK=1024
        )
        return out
    values = code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()]
    return out.copy_((values.view(-1, block_size) * scales[:, None]).view(out.shape))


if triton is not None:

    @triton.jit
    def dequantize_4bit_kernel(
        packed_ptr, scales_ptr, code_ptr, out_ptr, width, out_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        bytes_in_row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = 2 * bytes_in_row < width
        packed = tl.load(packed_ptr + row * (width // 2) + bytes_in_row, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + (row * width + 2 * bytes_in_row) // BLOCK_SIZE, mask=mask, other=0.0)
        first = tl.load(code_ptr + (packed >> 4)) * scale
        second = tl.load(code_ptr + (packed & 15)) * scale
        column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + row * out_stride + column, tl.interleave(first, second), mask=column < width)
