"""Attention over packed rows without the FlashAttention package: `attn_implementation: packed`.

TRL packs rows into one long row and passes the offset of each (`cu_seq_lens_q`). transformers' sdpa would build a mask
of length x length and compute every pair. Here each row attends to itself only: by torch's own kernel (`varlen_attn`,
capability 8.0 and newer), elsewhere by one sdpa call per row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query (1, heads, tokens, width) -> (1, tokens, heads, width); `cu_seq_lens_q` (rows + 1,): offsets of rows.

    Without `cu_seq_lens_q` (a batch of separate rows) it is transformers' sdpa. Raises ValueError for packed rows in a
    batch of more than 1, or with attention dropout.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or dropout:
        raise ValueError(f"packed rows come as a batch of 1 without attention dropout, not {query.shape[0]}, {dropout}")
    groups = query.shape[1] // key.shape[1]
    key, value = (state.repeat_interleave(groups, dim=1) if groups > 1 else state for state in (key, value))
    if query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0) and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            *(state[0].transpose(0, 1) for state in (query, key, value)),
            cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0),
        )  # fmt: skip
        return attended[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(state.split(lengths, dim=2) for state in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling) for row in rows]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def packed_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """sdpa's mask for padded rows; None for packed ones, whose limits `cu_seq_lens_q` has."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register_packed_attention() -> None:
    """Make `attn_implementation="packed"` known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, packed_mask)
