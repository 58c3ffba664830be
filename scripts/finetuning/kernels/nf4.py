"""bitsandbytes' 4-bit weights (NF4, FP4), unpacked into rows that have room behind them."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton


def dequantize_4bit(packed: Tensor, scales: Tensor, code: Tensor, block_size: int, out: Tensor) -> Tensor:
    """bitsandbytes' 4-bit numbers, two a byte, the first in the upper half -> `out` (rows, even width).

    Number i is code[...] (16 values) * scales[i // block_size]. The rows of `out` may lie apart (stride (any, 1)), which
    bitsandbytes' own kernel cannot do; its values are these.
    """
    packed = packed.flatten().view(torch.uint8)
    if runs_triton(packed):
        rows, width = out.shape
        dequantize_4bit_kernel[(rows, triton.cdiv(width, 2048))](
            packed, scales, code, out, width, out.stride(0), BLOCK_SIZE=block_size, BLOCK=1024
        )
        return out
    numbers = code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()]
    return out.copy_((numbers.view(-1, block_size) * scales[:, None]).view(out.shape))


if triton is not None:

    @triton.jit
    def dequantize_4bit_kernel(
        packed_ptr, scales_ptr, code_ptr, out_ptr, width, out_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = 2 * byte < width
        packed = tl.load(packed_ptr + row * (width // 2) + byte, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + (row * width + 2 * byte) // BLOCK_SIZE, mask=inside, other=0.0)
        first = tl.load(code_ptr + (packed >> 4)) * scale
        second = tl.load(code_ptr + (packed & 15)) * scale
        column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + row * out_stride + column, tl.interleave(first, second), mask=column < width)
