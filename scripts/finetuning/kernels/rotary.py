"""Rotary position embedding (arXiv 2104.09864) of stacked queries, keys and values, forward and backward.

Liger-Kernel has one too, but writes dense rows. Here `out` may be rows with room for LoRA's low-rank columns, so that
the next product needs no copy.
"""

import torch
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton, upcast


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (batch, tokens, q + k + v) -> rotated queries, rotated keys, values: (batch, tokens, heads, head width) each.

    `cos` and `sin` are (batch or 1, tokens, head width); `heads` is the number of query heads and of key heads.
    """
    batch, tokens, _ = qkv.shape
    num_heads, num_kv_heads = heads
    width = cos.shape[-1]
    if runs_triton(qkv):
        query = qkv.new_empty(batch, tokens, num_heads, width)
        key, value = (qkv.new_empty(batch, tokens, num_kv_heads, width) for _ in range(2))
        launch_rotate(qkv.view(batch * tokens, -1), query, key, value, cos, sin, backward=False)
        return query, key, value
    stacked = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, width))
    first, second = upcast(stacked[:, :, : num_heads + num_kv_heads]).chunk(2, dim=-1)
    cos_first, cos_second = upcast(cos)[:, :, None].chunk(2, dim=-1)
    sin_first, sin_second = upcast(sin)[:, :, None].chunk(2, dim=-1)
    rotated = [first * cos_first - second * sin_first, second * cos_second + first * sin_second]
    query, key = torch.cat(rotated, dim=-1).to(qkv.dtype).split(heads, dim=2)
    return query, key, stacked[:, :, num_heads + num_kv_heads :].contiguous()


def split_and_rotate_backward(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Gradients of the three (batch, tokens, heads, head width) -> gradient of qkv, written into `out`.

    `out` is (batch * tokens, q + k + v), of stride (any, 1).
    """
    if runs_triton(query):
        launch_rotate(out, query.contiguous(), key.contiguous(), value.contiguous(), cos, sin, backward=True)
        return
    first, second = upcast(torch.cat([query, key], dim=2)).chunk(2, dim=-1)
    cos_first, cos_second = upcast(cos)[:, :, None].chunk(2, dim=-1)
    sin_first, sin_second = upcast(sin)[:, :, None].chunk(2, dim=-1)
    rotated = [first * cos_first + second * sin_second, second * cos_second - first * sin_first]
    out.copy_(torch.cat([torch.cat(rotated, dim=-1).to(query.dtype), value], dim=2).flatten(0, 1).flatten(1))


def launch_rotate(
    qkv: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *, backward: bool
) -> None:
    """Launch `rotate_kernel`, one program for each token and each of queries, keys, values."""
    batch, tokens, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    rotate_kernel[(batch * tokens, 3)](
        qkv, query, key, value, cos, sin, qkv.stride(0), cos.shape[0] * tokens, num_heads, num_kv_heads,
        HALF=width // 2, BLOCK_HALF=triton.next_power_of_2(width // 2), BACKWARD=backward,
        BLOCK_HEADS=triton.next_power_of_2(num_heads), num_warps=8 if num_heads * width > 2048 else 4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def rotate_kernel(
        qkv_ptr, query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, qkv_stride, positions, num_heads, num_kv_heads,
        HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)  # queries, keys, values
        heads = num_heads
        first_head = 0
        part_ptr = query_ptr
        if part == 1:
            heads = num_kv_heads
            first_head = num_heads
            part_ptr = key_ptr
        if part == 2:
            heads = num_kv_heads
            first_head = num_heads + num_kv_heads
            part_ptr = value_ptr
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        column = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (head < heads) & (column < HALF)
        stacked = qkv_ptr + row * qkv_stride + (first_head + head) * 2 * HALF + column
        separate = part_ptr + (row * heads + head) * 2 * HALF + column
        if BACKWARD:
            first = tl.load(separate, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(separate + HALF, mask=mask, other=0.0).to(tl.float32)
        else:
            first = tl.load(stacked, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(stacked + HALF, mask=mask, other=0.0).to(tl.float32)
        if part < 2:
            angle = (row % positions) * 2 * HALF + column
            cos_first = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
            cos_second = tl.load(cos_ptr + angle + HALF, mask=column < HALF, other=0.0).to(tl.float32)
            sin_first = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
            sin_second = tl.load(sin_ptr + angle + HALF, mask=column < HALF, other=0.0).to(tl.float32)
            if BACKWARD:
                rotated = first * cos_first + second * sin_second
                second = second * cos_second - first * sin_first
            else:
                rotated = first * cos_first - second * sin_first
                second = second * cos_second + first * sin_second
            first = rotated
        if BACKWARD:
            tl.store(stacked, first, mask=mask)
            tl.store(stacked + HALF, second, mask=mask)
        else:
            tl.store(separate, first, mask=mask)
            tl.store(separate + HALF, second, mask=mask)
