"""FP8 (E4M3) with one scale for each row: rounding to it, and products of what is rounded."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton

E4M3_MAX = 448.0


def quantize_rows_to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> values in FP8 (E4M3) and the fp32 scale of each row, (rows, 1), that brings them back."""
    if runs_triton(tensor):
        rows, width = tensor.shape
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=tensor.device)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=tensor.device)
        quantize_rows_to_fp8_kernel[(rows,)](
            tensor, values, scale, E4M3_MAX, width, BLOCK=min(triton.next_power_of_2(width), 16384), num_warps=8
        )
        return values, scale
    wide = tensor.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_linear(left: Tensor, values: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """left (rows, shared) times the transpose of `quantize_rows_to_fp8`' values and scale, (columns, shared) and (columns, 1)."""
    left_values, left_scale = quantize_rows_to_fp8(left.contiguous())
    return torch._scaled_mm(
        left_values, values.T, scale_a=left_scale, scale_b=scale.T, out_dtype=out_dtype, use_fast_accum=True
    )


if triton is not None:

    @triton.jit
    def quantize_rows_to_fp8_kernel(
        tensor_ptr, values_ptr, scale_ptr, largest, width: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        maximum = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=inside, other=0.0).to(tl.float32)
            maximum = tl.maximum(maximum, tl.abs(part))
        scale = tl.maximum(tl.max(maximum, 0), 1e-12) / largest
        tl.store(scale_ptr + row, scale)
        inverse = 1.0 / scale
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=inside, other=0.0).to(tl.float32)
            quantized = tl.minimum(tl.maximum(part * inverse, -largest), largest)
            tl.store(values_ptr + row * width + start + columns, quantized.to(tl.float8e4nv), mask=inside)
