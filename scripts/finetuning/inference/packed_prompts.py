"""Prompts laid out as one flat sequence of tokens without padding, and attention over it.

A prompt is a path in a forest of segments: an image prefix, behind it the questions about the image, behind those
continuations to be scored. Each segment attends causally to itself and fully to its ancestors, so what is common is
computed once. Segments lie depth by depth, children in the order of their parents. The tokens of a segment may be a
tree themselves: many short continuations of one prompt, what they share computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

# Where a batched kernel beats the one for variable lengths (cuDNN's on an H200: twice as fast at 600 tokens).
SHORTEST_OF_BLOCK = 128  # tokens
FEWEST_IN_BLOCK = 4  # segments


@dataclass(frozen=True)
class Segment:
    """Token ids (1-D), and the number of the segment that comes before it; None where a prompt begins.

    Tokens that are a tree attend to what `sees` (tokens, tokens) says, and lie `steps` (tokens,) behind the parent's end.
    """

    tokens: Tensor
    parent: int | None = None
    sees: Tensor | None = None
    steps: Tensor | None = None


@dataclass(frozen=True)
class CrossAttention:
    """The queries of one depth and the keys of one depth above it, as slices of the flat tokens and cumulative lengths."""

    queries: slice
    keys: slice
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


class PackedPrompts:
    """Segments as flat tokens: where each lies, its position in its prompt, and what attends to what.

    `segments` must be ordered by depth and, within a depth, as their parents are. `starts[i]` and `lengths[i]` say where
    segment i lies; `tokens` and `positions` are (total,), on `device`.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str = "cpu"):
        self.segments, self.device = segments, device
        self.lengths = [len(segment.tokens) for segment in segments]
        self.ends = list(accumulate(self.lengths))
        self.starts = [end - length for end, length in zip(self.ends, self.lengths, strict=True)]
        self.depths: list[int] = []
        offsets: list[int] = []
        for segment in segments:
            parent = segment.parent
            self.depths.append(0 if parent is None else self.depths[parent] + 1)
            offsets.append(0 if parent is None else offsets[parent] + self.lengths[parent])
        if self.depths != sorted(self.depths):
            raise ValueError("segments must be ordered by depth")
        self.tokens = torch.cat([segment.tokens for segment in segments]).to(device, non_blocking=True)
        shift = [offset - start for offset, start in zip(offsets, self.starts, strict=True)]
        lengths = torch.tensor(self.lengths)
        positions = torch.arange(self.ends[-1]) + torch.tensor(shift).repeat_interleave(lengths)
        for segment, offset, start, end in zip(segments, offsets, self.starts, self.ends, strict=True):
            if segment.steps is not None:
                positions[start:end] = offset + segment.steps
        self.positions = positions.to(device, non_blocking=True)

    def ancestors(self, segment: int) -> list[int]:
        """From the first segment of the prompt to the parent."""
        parent = self.segments[segment].parent
        return [] if parent is None else [*self.ancestors(parent), parent]

    def cumulative(self, lengths: Sequence[int]) -> Tensor:
        """(n + 1) int32 on the device: where each of n segments begins, and the end."""
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def blocks(self) -> list[range]:
        """Neighbouring first segments of one long length, in ranges of segment numbers: they are a plain batch."""
        blocks = []
        for length, numbers in groupby(range(self.depths.count(0)), key=self.lengths.__getitem__):
            numbers = list(numbers)
            if length >= SHORTEST_OF_BLOCK and len(numbers) >= FEWEST_IN_BLOCK:
                blocks.append(range(numbers[0], numbers[-1] + 1))
        return blocks

    @cached_property
    def trees(self) -> list[tuple[Tensor, Tensor]]:
        """Segments that are the same tree: their tokens' indices (trees, tokens), and what a token sees."""
        alike: dict[int, list[int]] = {}
        for number, segment in enumerate(self.segments):
            if segment.sees is not None:
                alike.setdefault(id(segment.sees), []).append(number)
        trees = []
        for numbers in alike.values():
            places = torch.tensor([self.starts[number] for number in numbers])[:, None]
            places = places + torch.arange(self.lengths[numbers[0]])
            sees = self.segments[numbers[0]].sees
            trees.append(tuple(tensor.to(self.device, non_blocking=True) for tensor in (places, sees)))
        return trees

    @cached_property
    def between_blocks(self) -> list[tuple[slice, Tensor, int]]:
        """What is in no block and no tree: slices of the tokens, the ends of their segments, the longest one's length."""
        in_blocks = {number for block in self.blocks for number in block}
        in_blocks |= {number for number, segment in enumerate(self.segments) if segment.sees is not None}
        rest = []
        for inside, numbers in groupby(range(len(self.lengths)), key=lambda number: number in in_blocks):
            numbers = list(numbers)
            if not inside:
                lengths = [self.lengths[number] for number in numbers]
                tokens = slice(self.starts[numbers[0]], self.ends[numbers[-1]])
                rest.append((tokens, self.cumulative(lengths), max(lengths)))
        return rest

    @cached_property
    def crossings(self) -> list[CrossAttention]:
        """For each depth but the first, one for each depth above it."""
        at_depth: dict[int, list[int]] = {}
        for segment, depth in enumerate(self.depths):
            at_depth.setdefault(depth, []).append(segment)
        crossings = []
        for depth, segments in at_depth.items():
            for above in range(depth):
                num_queries = dict.fromkeys(at_depth[above], 0)
                for segment in segments:
                    num_queries[self.ancestors(segment)[above]] += self.lengths[segment]
                num_keys = [self.lengths[segment] for segment in at_depth[above]]
                crossings.append(
                    CrossAttention(
                        slice(self.starts[segments[0]], self.ends[segments[-1]]),
                        slice(self.starts[at_depth[above][0]], self.ends[at_depth[above][-1]]),
                        self.cumulative(list(num_queries.values())),
                        self.cumulative(num_keys),
                        max(num_queries.values()),
                        max(num_keys),
                    )
                )
        return crossings


def packed_attention(prompts: PackedPrompts, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(tokens, heads, width) -> the same shape; keys and values may have fewer heads."""
    if query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return varlen_attention(prompts, query, key, value, scale)
    attended = torch.empty_like(query)
    for segment, (start, end) in enumerate(zip(prompts.starts, prompts.ends, strict=True)):
        before = [slice(prompts.starts[above], prompts.ends[above]) for above in prompts.ancestors(segment)]
        keys, values = (torch.cat([state[run] for run in [*before, slice(start, end)]]) for state in (key, value))
        mask, sees = None, prompts.segments[segment].sees
        if before and end - start > 1:
            mask = torch.ones(end - start, len(keys), dtype=torch.bool, device=query.device)
            mask = mask.tril(len(keys) - (end - start))
            if sees is not None:
                mask[:, start - end :] = sees.to(query.device)
        attended[start:end] = F.scaled_dot_product_attention(
            *(state.transpose(0, 1)[None] for state in (query[start:end], keys, values)),
            attn_mask=mask,
            is_causal=not before,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
    return attended


def varlen_attention(prompts: PackedPrompts, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by the variable-length FlashAttention that torch ships.

    Attention over several sets of keys is the sets' outputs, weighted by their shares of the sum of exponentials
    (Milakov & Gimelshein, arXiv 1805.02867).
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    groups = query.shape[1] // key.shape[1]
    key, value = (state.repeat_interleave(groups, dim=1) if groups > 1 else state for state in (key, value))
    attended = torch.empty_like(query)
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32) if prompts.crossings else None
    for block in prompts.blocks:
        tokens = slice(prompts.starts[block[0]], prompts.ends[block[-1]])
        batch = (state[tokens].unflatten(0, (len(block), -1)).transpose(1, 2) for state in (query, key, value))
        of_block = F.scaled_dot_product_attention(*batch, is_causal=True, scale=scale)
        attended[tokens] = of_block.transpose(1, 2).flatten(0, 1)
    aux = AuxRequest(lse=True)
    for tokens, ends, longest in prompts.between_blocks:
        attended[tokens], log_sum_here = varlen_attn(
            query[tokens], key[tokens], value[tokens], ends, ends, longest, longest,
            scale=scale, window_size=(-1, 0), return_aux=aux,
        )  # fmt: skip
        if log_sum is not None:
            log_sum[tokens] = log_sum_here.T
    for places, sees in prompts.trees:
        rows = (state[places].transpose(1, 2) for state in (query, key, value))
        of_trees, log_sum_here = tree_attention(*rows, sees, scale)
        attended[places] = of_trees.transpose(1, 2)
        log_sum[places] = log_sum_here.transpose(1, 2)
    for crossing in prompts.crossings:
        of_above, log_sum_above = varlen_attn(
            query[crossing.queries], key[crossing.keys], value[crossing.keys], crossing.query_ends, crossing.key_ends,
            crossing.longest_query, crossing.longest_key, scale=scale, return_aux=aux,
        )  # fmt: skip
        so_far, before = attended[crossing.queries], log_sum[crossing.queries]
        share = torch.sigmoid(log_sum_above.T - before)[..., None]
        attended[crossing.queries] = (so_far * (1 - share) + of_above * share).to(attended.dtype)
        log_sum[crossing.queries] = torch.logaddexp(before, log_sum_above.T)
    return attended


def tree_attention(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(trees, heads, tokens, width) and a mask (tokens, tokens) -> attended of that shape, log-sums (trees, heads, tokens)."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scale).masked_fill_(~sees, float("-inf"))
    log_sum = scores.logsumexp(-1)
    return torch.matmul((scores - log_sum[..., None]).exp().to(value.dtype), value), log_sum
