"""Attention of dialogues that share an image prefix: each sees the prefix and itself (`data/shared_prefix.py`).

[image prefix | dialogue 1 | dialogue 2 | ...]
"""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import BlockMask, sdpa_mask
from transformers.utils import is_torch_flex_attn_available

from finetuning.data.shared_prefix import PREFIX
from finetuning.models.parts import base_model_of

if is_torch_flex_attn_available():
    from torch.nn.attention.flex_attention import create_block_mask

ATTENTION_NAME = "shared_prefix"


def enable_shared_prefix(model: nn.Module) -> None:
    """Let the language model of `model` take `branch_ids` and, where it is given, `prefix_length`; in place.

    `attn_implementation` may be eager, sdpa or flex_attention. Raises ValueError for any other, which takes no mask.
    """
    language_model = base_model_of(model).model.language_model
    attention = language_model.config._attn_implementation
    if attention not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"share_image_prefix needs a mask that {attention} cannot take: set attn_implementation to sdpa, "
            "flex_attention or eager"
        )
    if attention == "sdpa":
        AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        language_model.set_attn_implementation(ATTENTION_NAME)
    language_model.register_forward_pre_hook(mask_branches_hook, with_kwargs=True)


def mask_branches_hook(language_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the language model: `branch_ids` of the batch become its attention mask."""
    branch_ids = kwargs.pop("branch_ids", None)
    if branch_ids is not None:
        attention = language_model.config._attn_implementation
        kwargs["attention_mask"] = branch_mask(branch_ids, attention, kwargs["inputs_embeds"].dtype)
    return args, kwargs


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix_length: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query, key, value (batch, heads, tokens, width) -> (batch, tokens, heads, width), by sdpa.

    With `prefix_length` (tokens, the same for all sequences) only the rest of a sequence, a tenth of it, needs a mask:
    the prefix is causal. Without it `attention_mask` (batch, 1, tokens, tokens) masks everything.
    """
    if prefix_length is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if can_merge_attention(query, key, value, **kwargs):
        rest_mask = attention_mask[:, :, prefix_length:, prefix_length:]
        # The least fp16 value, whose exp() is 0: cuDNN does not handle -inf well.
        bias = torch.where(rest_mask, 0.0, -65504.0).to(query.dtype)
        key, value = (repeat_kv(state, query.shape[1] // state.shape[1]) for state in (key, value))
        return MergedAttention.apply(query, key, value, bias, prefix_length, kwargs.get("scaling")), None
    *prefix_states, rest_query, key, value = SplitPrefix.apply(query, key, value, prefix_length)
    prefix, _ = sdpa_attention_forward(module, *prefix_states, None, **kwargs)
    rest, _ = sdpa_attention_forward(module, rest_query, key, value, attention_mask[:, :, prefix_length:], **kwargs)
    return torch.cat([prefix, rest], dim=1), None


def can_merge_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, softcap: float | None = None, **kwargs
) -> bool:
    """Whether `MergedAttention` has a kernel: where torch chooses cuDNN (from Hopper on, 16 bits), or on a CPU."""
    kernel = torch._fused_sdp_choice(
        query, key, value, None, dropout, is_causal=True, enable_gqa=key.shape[1] < query.shape[1]
    )
    required = SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    return query.device.type in ("cuda", "cpu") and kernel == required.value and dropout == 0 and softcap is None


class MergedAttention(torch.autograd.Function):
    """Queries, keys, values (batch, heads, tokens, width) -> outputs (batch, tokens, heads, width).

    All queries attend causally to the first `length` keys. Queries after `length` also attend to the other keys, with
    `bias` (batch, 1, rest, rest) of 0 and -65504. The softmax over both sets is the sum of the two outputs, weighted by
    their shares of the sum of exponentials (Milakov & Gimelshein, arXiv 1805.02867). The backward pass of one set needs
    only the merged output and log-sum-exp of both (Liu et al., arXiv 2310.01889): each key's gradient is computed once,
    and no tensor as long as the prefix is added.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, length: int, scale: float | None
    ) -> Tensor:
        """`length` is that of the prefix in tokens, `scale` multiplies query key products (None: 1 / sqrt(width))."""
        out, logsumexp = attention_with_logsumexp(query, key[:, :, :length], value[:, :, :length], None, scale)
        rest_out, rest_logsumexp = attention_with_logsumexp(
            *(state[:, :, length:] for state in (query, key, value)), bias, scale
        )
        prefix_out, prefix_logsumexp = out[:, :, length:], logsumexp[:, :, length:]
        rest_share = torch.sigmoid(rest_logsumexp - prefix_logsumexp).view(*rest_out.shape[:3], 1)
        torch.addcmul(prefix_out * (1 - rest_share), rest_out, rest_share, out=prefix_out)
        torch.logaddexp(prefix_logsumexp, rest_logsumexp, out=prefix_logsumexp)
        attended = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, attended, logsumexp)
        ctx.length, ctx.scale = length, scale
        return attended

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient (batch, tokens, heads, width) -> those of queries, keys, values (batch, heads, tokens, width)."""
        query, key, value, bias, attended, logsumexp = ctx.saved_tensors
        length, scale = ctx.length, ctx.scale
        out, grad = attended.transpose(1, 2), grad.contiguous().transpose(1, 2)
        prefix_states = key[:, :, :length], value[:, :, :length]
        grad_query, *prefix_grads = attention_backward(grad, query, *prefix_states, out, logsumexp, None, scale)
        rest_states = [state[:, :, length:] for state in (grad, query, key, value, out)]
        rest_logsumexp = logsumexp[:, :, length:].contiguous()
        rest_grad_query, *rest_grads = attention_backward(*rest_states, rest_logsumexp, bias, scale)
        grad_query[:, :, length:] += rest_grad_query
        return grad_query, *map(concatenate_tokens, prefix_grads, rest_grads), None, None, None


def attention_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, tokens, width), and the log-sum-exp (batch, heads, tokens), of cuDNN (..., 1).

    Without `bias` attention is causal: query i sees the keys up to i.
    """
    if query.is_cuda:
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, compute_log_sumexp=True, is_causal=bias is None, scale=scale
        )
        return out, logsumexp
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=bias is None, attn_mask=bias, scale=scale
    )


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    bias: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `out` and `logsumexp` may have been merged with those of other keys."""
    if query.is_cuda:
        no_dropout = logsumexp.new_empty((), dtype=torch.int64)  # for the seed and offset that cuDNN takes
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, logsumexp, no_dropout, no_dropout, bias, None, None,
            query.shape[2], key.shape[2], 0.0, bias is None, scale=scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsumexp, 0.0, bias is None, attn_mask=bias, scale=scale
    )


def concatenate_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate (batch, heads, tokens, width) along the tokens; contiguous as (batch, tokens, heads, width).

    The backward pass of the rotary embedding reads it in this layout.
    """
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


class SplitPrefix(torch.autograd.Function):
    """Queries, keys, values (batch, heads, tokens, width) -> the prefix's three, other queries, all keys, all values.

    For hardware without `MergedAttention`. Slices would do the same, but autograd pads their gradients with zeros and
    adds them: 17 ms of a step of 284 in a 7B model.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, ...]:
        """Views, without a copy; `length` is that of the prefix in tokens."""
        prefix_states = (state[:, :, :length] for state in (query, key, value))
        return *prefix_states, query[:, :, length:], key, value

    @staticmethod
    def backward(
        ctx,
        prefix_query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        rest_query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the six outputs -> gradients of queries, keys and values."""
        # In place: attention has just allocated both gradients, and nobody else holds them.
        key[:, :, : prefix_key.shape[2]] += prefix_key
        value[:, :, : prefix_value.shape[2]] += prefix_value
        return concatenate_tokens(prefix_query, rest_query), key, value, None


def branch_mask(branch_ids: Tensor, attention: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """branch_ids (sequences, tokens) -> mask: a token sees earlier tokens of the prefix and of its own dialogue.

    sdpa: booleans (sequences, 1, tokens, tokens), True where it sees; eager: 0 there and the least value of `dtype`
    elsewhere; flex_attention: a BlockMask.
    """
    sequences, tokens = branch_ids.shape

    def is_visible(sequence, head, query, key):
        other, own = branch_ids[sequence, key], branch_ids[sequence, query]
        return (key <= query) & ((other == own) | (other == PREFIX))

    if attention == "flex_attention":
        return create_block_mask(is_visible, sequences, None, tokens, tokens, device=branch_ids.device)
    own, other = branch_ids[:, :, None], branch_ids[:, None, :]
    positions = torch.arange(tokens, device=branch_ids.device)
    mask = ((positions[None, :] <= positions[:, None]) & ((other == own) | (other == PREFIX)))[:, None]
    if attention != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
