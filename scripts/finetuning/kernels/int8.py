"""INT8 products: rotation by blocks, quantisation with one scale a row, and the product with its low-rank part.

One outlier of an activation would take the precision of its whole row. An orthogonal rotation of both operands along the
contracted axis spreads it over 128 numbers and leaves the product as it is: (x H) (W H)^T = x W^T (QuaRot, arXiv
2404.00456). H is block-diagonal, of Hadamard matrices of 128 rows. Sums of INT8 products are exact in int32.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from finetuning.kernels.dispatch import TensorDescriptor, runs_triton, tl, triton, upcast

INT8_MAX = 127.0
ROTATED = 128  # rows of a Hadamard matrix; the contracted axis is whole blocks of them
SMALLEST = 1e-30  # scale of a row of zeros


@cache
def hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix (128, 128) of 1 and -1, Sylvester's: symmetric, and 128 times its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < ROTATED:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device, dtype)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has, 132 of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether the GPU can copy tiles of tensors by itself, as the kernel asks of it: from compute capability 9.0 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def quantize_rows_to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """tensor (rows, columns) -> INT8 values of its rotation, and fp32 scales (rows,).

    Columns are a multiple of 128. Values times scale are the rotated tensor.
    """
    rows, width = tensor.shape
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    if runs_triton(tensor):
        values = torch.empty(rows, width, dtype=torch.int8, device=tensor.device)
        scale = torch.empty(rows, dtype=torch.float32, device=tensor.device)
        blocks = triton.next_power_of_2(width // ROTATED)
        rows_at_once = max(1, 128 // blocks)
        programs = min(triton.cdiv(rows, rows_at_once), 2 * multiprocessors(tensor.device))
        quantize_rows_to_int8_kernel[(programs,)](
            tensor, hadamard(tensor.dtype, tensor.device), values, scale, rows, width, tensor.stride(0),
            ROWS=rows_at_once, BLOCKS=blocks, SIZE=ROTATED, num_stages=2, num_warps=8,
        )  # fmt: skip
        return values, scale
    wide = upcast(tensor)
    rotated = (wide.unflatten(1, (-1, ROTATED)) @ hadamard(wide.dtype, wide.device)).flatten(1)
    largest = rotated.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    values = torch.floor(rotated * (INT8_MAX / largest) + 0.5).to(torch.int8)
    return values, (largest[:, 0] / (INT8_MAX * ROTATED**0.5)).float()


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_rows_to_int8` was given, but for its rounding: (rows, columns), rotated back."""
    back = values.float().unflatten(1, (-1, ROTATED)) @ hadamard(torch.float32, values.device)
    return (back.flatten(1) * (scale / ROTATED**0.5)[:, None]).to(dtype)


def int8_linear(
    x: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    out: Tensor,
    low_rank: tuple[Tensor, Tensor] | None = None,
    spans: Tensor | None = None,
    *,
    adds: bool = False,
) -> Tensor:
    """x W^T + x_a b into `out` (tokens, features), the sum rounded once; x and W as `quantize_rows_to_int8` gives them.

    `low_rank` is x_a (tokens, ranks) and b (ranks, features), of which one stride is 1; ranks are a multiple of 8.
    `spans` (features, 2), int32: between which rows a column of b is not zero; None: everywhere. `adds`: what `out`
    holds is one more addend.
    """
    (x_values, x_scale), (w_values, w_scale) = x, weight
    if runs_triton(x_values) and has_copy_engine(x_values.device):
        launch_int8_linear(x, weight, out, low_rank, spans, adds, tile_of(len(out)))
        return out
    kind = upcast(out).dtype
    product = (x_values.to(kind) @ w_values.to(kind).T) * x_scale[:, None] * w_scale
    if low_rank is not None:
        product += upcast(low_rank[0]) @ upcast(low_rank[1])
    return out.copy_(product + out if adds else product)


class Tile(NamedTuple):
    """What one program computes: rows, columns, and how much of the contracted axis it loads at once."""

    rows: int
    columns: int
    depth: int
    stages: int  # loads under way
    warps: int


def tile_of(tokens: int) -> Tile:
    """The fastest on an H200 (benchmarks/int8_speed.py); small tiles for few tokens, so that each multiprocessor has one."""
    return Tile(128, 128, 128, 3, 8) if tokens > 64 else Tile(64, 64, 256, 4, 4)


def launch_int8_linear(
    x: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    out: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    spans: Tensor | None,
    adds: bool,
    tile: Tile,
) -> None:
    """`int8_linear` on a GPU, with that tile."""
    (x_values, x_scale), (w_values, w_scale) = x, weight
    tokens, width = x_values.shape
    features = len(w_values)
    columns = min(tile.columns, 128)
    x_a, b = (out, out) if low_rank is None else low_rank
    is_transposed = b.stride(0) == 1
    int8_linear_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(features, tile.columns),)](
        TensorDescriptor.from_tensor(x_values, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w_values, [tile.columns, tile.depth]),
        TensorDescriptor.from_tensor(x_a, [tile.rows, 64]),
        TensorDescriptor.from_tensor(b.T if is_transposed else b, [columns, 64] if is_transposed else [64, columns]),
        TensorDescriptor.from_tensor(out, [tile.rows, columns]),
        x_scale, w_scale, spans, tokens, features, width, x_a.shape[1],
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, BLOCK_R=64, GROUP=8,
        HAS_LOW_RANK=low_rank is not None, HAS_SPANS=spans is not None, IS_TRANSPOSED=is_transposed, ADDS=adds,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


if triton is not None:

    @triton.jit(do_not_specialize=["rows"])
    def quantize_rows_to_int8_kernel(
        tensor_ptr, hadamard_ptr, values_ptr, scale_ptr, rows, width, stride,
        ROWS: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        index, column = tl.arange(0, ROWS * BLOCKS), tl.arange(0, SIZE)
        hadamard = tl.load(hadamard_ptr + column[:, None] * SIZE + column[None, :])
        for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            row = (first + index // BLOCKS).to(tl.int64)
            start = (index % BLOCKS) * SIZE
            inside = ((row < rows) & (start < width))[:, None]
            tensor = tl.load(tensor_ptr + (row * stride + start)[:, None] + column[None, :], mask=inside, other=0.0)
            rotated = tl.dot(tensor, hadamard, input_precision="ieee")
            largest = tl.max(tl.reshape(tl.max(tl.abs(rotated), 1), [ROWS, BLOCKS]), 1)
            largest = tl.maximum(largest, 1e-30)
            factor = tl.reshape(tl.broadcast_to((127.0 / largest)[:, None], [ROWS, BLOCKS]), [ROWS * BLOCKS])
            values = tl.floor(rotated * factor[:, None] + 0.5).to(tl.int8)
            tl.store(values_ptr + (row * width + start)[:, None] + column[None, :], values, mask=inside)
            of_scale = first + tl.arange(0, ROWS)
            tl.store(scale_ptr + of_scale, largest / (127.0 * 11.313708498984761), mask=of_scale < rows)

    @triton.jit
    def write_tile(
        sums, first_row, first_column, x_a_desc, b_desc, out_desc, x_scale_ptr, w_scale_ptr, spans_ptr,
        tokens, features, ranks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
        HAS_LOW_RANK: tl.constexpr, HAS_SPANS: tl.constexpr, IS_TRANSPOSED: tl.constexpr, ADDS: tl.constexpr,
    ):  # fmt: skip
        """Scale the int32 sums (BLOCK_M, BLOCK_N), add the low-rank part and what is there, and write the tile."""
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scale_ptr + row, mask=row < tokens, other=0.0)
        w_scale = tl.load(w_scale_ptr + column, mask=column < features, other=0.0)
        product = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if HAS_LOW_RANK:
            first, last = 0, ranks
            if HAS_SPANS:
                first = tl.load(spans_ptr + 2 * tl.minimum(first_column, features - 1))
                last = tl.load(spans_ptr + 2 * tl.minimum(first_column + BLOCK_N, features) - 1)
            for start in range(first, last, BLOCK_R):
                x_a = x_a_desc.load([first_row, start])
                if IS_TRANSPOSED:
                    product = tl.dot(x_a, b_desc.load([first_column, start]).T, product, input_precision="ieee")
                else:
                    product = tl.dot(x_a, b_desc.load([start, first_column]), product, input_precision="ieee")
        if ADDS:
            product += out_desc.load([first_row, first_column]).to(tl.float32)
        out_desc.store([first_row, first_column], product.to(out_desc.dtype))

    @triton.jit(do_not_specialize=["tokens"])
    def int8_linear_kernel(
        x_desc, w_desc, x_a_desc, b_desc, out_desc, x_scale_ptr, w_scale_ptr, spans_ptr, tokens, features, width, ranks,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
        GROUP: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_SPANS: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
        ADDS: tl.constexpr,
    ):  # fmt: skip
        # Tiles of GROUP rows of tiles run side by side, so that their weights are read from the cache.
        tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(features, BLOCK_N)
        group = tl.program_id(0) // (GROUP * tiles_n)
        rows_in_group = tl.minimum(tiles_m - group * GROUP, GROUP)
        first_row = (group * GROUP + tl.program_id(0) % (GROUP * tiles_n) % rows_in_group) * BLOCK_M
        first_column = (tl.program_id(0) % (GROUP * tiles_n) // rows_in_group) * BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        for start in range(0, width, BLOCK_K):
            x = x_desc.load([first_row, start])
            w = w_desc.load([first_column, start])
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
        if BLOCK_N > 128:  # in halves: sums, products and both factors of the low-rank part fill the registers
            halves = tl.split(tl.permute(tl.reshape(sums, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
            for half in tl.static_range(2):
                write_tile(
                    halves[half], first_row, first_column + half * (BLOCK_N // 2), x_a_desc, b_desc, out_desc,
                    x_scale_ptr, w_scale_ptr, spans_ptr, tokens, features, ranks,
                    BLOCK_M, BLOCK_N // 2, BLOCK_R, HAS_LOW_RANK, HAS_SPANS, IS_TRANSPOSED, ADDS,
                )  # fmt: skip
        else:
            write_tile(
                sums, first_row, first_column, x_a_desc, b_desc, out_desc, x_scale_ptr, w_scale_ptr, spans_ptr,
                tokens, features, ranks, BLOCK_M, BLOCK_N, BLOCK_R, HAS_LOW_RANK, HAS_SPANS, IS_TRANSPOSED, ADDS,
            )  # fmt: skip
