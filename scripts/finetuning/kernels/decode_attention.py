"""Attention of one new token a row over keys and values that lie in runs of a shared pool.

A row's keys are a few runs of slots: the image prefix that it shares with other rows, its own question, its answer so
far. Rows that share a prefix read the same slots, so the prefix is stored once, and a row leaves a batch without moving
a key. Plain torch gathers the runs; on a CUDA device with Triton one kernel reads them where they lie, once
(FlashDecoding's single-query loop; the runs are a coarse form of PagedAttention's block table, arXiv 2309.06180).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finetuning.kernels.dispatch import runs_triton, tl, triton


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, runs: Tensor, scale: float, slots: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(rows, heads, width) -> what each query finds in its row's runs, of the same shape.

    `keys` and `values` are (slots, kv heads, width). `runs` is (rows, runs, 2), int32: first slot and number of slots,
    at least one slot a row. `slots` is `slots_of(runs)`, for callers that have it at hand; the kernel needs none.
    """
    rows, heads, width = query.shape
    kv_heads = keys.shape[1]
    if runs_triton(query):
        out = torch.empty_like(query)
        decode_attention_kernel[(rows, kv_heads)](
            query, keys, values, out, runs, scale, kv_heads,
            GROUP=heads // kv_heads, BLOCK_GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
            WIDTH=width, BLOCK_WIDTH=max(16, triton.next_power_of_2(width)), RUNS=runs.shape[1],
            BLOCK=64 if width <= 128 else 32, num_warps=4, num_stages=2,
        )  # fmt: skip
        return out
    places, inside = slots_of(runs) if slots is None else slots
    attended = F.scaled_dot_product_attention(
        query[:, :, None],
        keys[places].transpose(1, 2),
        values[places].transpose(1, 2),
        attn_mask=inside[:, None, None],
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return attended[:, :, 0]


def slots_of(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Runs (rows, runs, 2) -> the slots of each row side by side (rows, most slots), and which of them are real."""
    starts, lengths = runs.long().unbind(-1)
    ends = lengths.cumsum(1)
    column = torch.arange(int(ends[:, -1].max()), device=runs.device).expand(len(runs), -1).contiguous()
    run = torch.searchsorted(ends, column, right=True).clamp_(max=runs.shape[1] - 1)
    places = column - (ends - lengths).gather(1, run) + starts.gather(1, run)
    inside = column < ends[:, -1:]
    return places.where(inside, starts[:, -1:]), inside


if triton is not None:

    @triton.jit
    def decode_attention_kernel(
        query_ptr, keys_ptr, values_ptr, out_ptr, runs_ptr, scale, kv_heads,
        GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
        RUNS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        kv_head = tl.program_id(1)
        group = tl.arange(0, BLOCK_GROUP)[:, None]
        column = tl.arange(0, BLOCK_WIDTH)
        inside_query = (group < GROUP) & (column[None, :] < WIDTH)
        place = ((row * kv_heads + kv_head) * GROUP + group) * WIDTH + column[None, :]
        query = tl.load(query_ptr + place, mask=inside_query, other=0.0)
        largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        summed = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], tl.float32)
        for run in tl.static_range(RUNS):
            start = tl.load(runs_ptr + (row * RUNS + run) * 2).to(tl.int64)
            length = tl.load(runs_ptr + (row * RUNS + run) * 2 + 1)
            for first in range(0, length, BLOCK):
                slot = first + tl.arange(0, BLOCK)
                inside = slot < length
                offset = ((start + slot) * kv_heads + kv_head) * WIDTH
                key = tl.load(
                    keys_ptr + offset[None, :] + column[:, None],
                    mask=inside[None, :] & (column[:, None] < WIDTH),
                    other=0.0,
                )
                score = tl.dot(query, key, input_precision="ieee") * scale
                score = tl.where(inside[None, :], score, float("-inf"))
                new_largest = tl.maximum(largest, tl.max(score, 1))
                weight = tl.exp(score - new_largest[:, None])
                shrink = tl.exp(largest - new_largest)
                value = tl.load(
                    values_ptr + offset[:, None] + column[None, :],
                    mask=inside[:, None] & (column[None, :] < WIDTH),
                    other=0.0,
                )
                weighted = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
                summed = summed * shrink[:, None] + weighted
                total = total * shrink + tl.sum(weight, 1)
                largest = new_largest
        tl.store(out_ptr + place, summed / total[:, None], mask=inside_query)
