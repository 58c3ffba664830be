"""FP8 (E4M3) with one scale for each row: quantization, and the product of quantized matrices."""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton

E4M3_MAX = 448.0


def quantize_rows_to_fp8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """tensor (rows, columns), contiguous -> FP8 values (rows, columns) and fp32 scales (rows, 1), its two factors."""
    if runs_triton(tensor):
        rows, width = tensor.shape
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=tensor.device)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=tensor.device)
        quantize_rows_to_fp8_kernel[(rows,)](
            tensor, values, scale, E4M3_MAX, width, BLOCK=min(triton.next_power_of_2(width), 16384), num_warps=8
        )
        return values, scale
    tensor_fp32 = tensor.float()
    scale = tensor_fp32.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (tensor_fp32 / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_linear(x: Tensor, values: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """x W^T in `out_dtype`: x (rows, in) is quantized here, W (out, in) is `values` with `scale` (out, 1)."""
    x_values, x_scale = quantize_rows_to_fp8(x.contiguous())
    return torch._scaled_mm(
        x_values, values.T, scale_a=x_scale, scale_b=scale.T, out_dtype=out_dtype, use_fast_accum=True
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
            mask = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=mask, other=0.0).to(tl.float32)
            maximum = tl.maximum(maximum, tl.abs(part))
        scale = tl.maximum(tl.max(maximum, 0), 1e-12) / largest
        tl.store(scale_ptr + row, scale)
        inverse = 1.0 / scale
        for start in range(0, width, BLOCK):
            mask = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=mask, other=0.0).to(tl.float32)
            quantized = tl.minimum(tl.maximum(part * inverse, -largest), largest)
            tl.store(values_ptr + row * width + start + columns, quantized.to(tl.float8e4nv), mask=mask)
