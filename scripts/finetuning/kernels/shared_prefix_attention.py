"""Attention over an image prefix and the dialogues that share it (`finetuning.data.shared_prefix`)."""

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

NAME = "shared_prefix"


def enable_shared_prefix(model: nn.Module) -> None:
    """Let the language model of `model` read `branch_ids` and, where it is given, `prefix_length`.

    Works with eager, sdpa and flex_attention. Raises ValueError for another attention, which takes no mask.
    """
    language_model = base_model_of(model).model.language_model
    attention = language_model.config._attn_implementation
    if attention not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"share_image_prefix needs a mask that {attention} cannot take: set attn_implementation to sdpa, "
            "flex_attention or eager"
        )
    if attention == "sdpa":
        AttentionInterface.register(NAME, shared_prefix_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        language_model.set_attn_implementation(NAME)
    language_model.register_forward_pre_hook(mask_branches_hook, with_kwargs=True)


def mask_branches_hook(language_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
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
    """sdpa; with `prefix_length` the prefix's keys need no mask, and only the rest, a tenth of a sequence, has one."""
    if prefix_length is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if can_merge_attention(query, key, value, **kwargs):
        of_rest = attention_mask[:, :, prefix_length:, prefix_length:]
        # Not -inf, which cuDNN takes badly; exp() of it is 0 all the same.
        bias = torch.where(of_rest, 0.0, -65504.0).to(query.dtype)
        key, value = (repeat_kv(state, query.shape[1] // state.shape[1]) for state in (key, value))
        return MergedAttention.apply(query, key, value, bias, prefix_length, kwargs.get("scaling")), None
    *of_prefix, rest_query, key, value = SplitPrefix.apply(query, key, value, prefix_length)
    prefix, _ = sdpa_attention_forward(module, *of_prefix, None, **kwargs)
    rest, _ = sdpa_attention_forward(module, rest_query, key, value, attention_mask[:, :, prefix_length:], **kwargs)
    return torch.cat([prefix, rest], dim=1), None


def can_merge_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, softcap: float | None = None, **kwargs
) -> bool:
    """Whether `MergedAttention` can compute this: where torch itself takes cuDNN (Hopper on, 16 bits), or on a CPU."""
    kernel = torch._fused_sdp_choice(
        query, key, value, None, dropout, is_causal=True, enable_gqa=key.shape[1] < query.shape[1]
    )
    fitting = SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.FLASH_ATTENTION
    return query.device.type in ("cuda", "cpu") and kernel == fitting.value and dropout == 0 and softcap is None


class MergedAttention(torch.autograd.Function):
    """Queries, keys, values (batch, heads, tokens, width) -> outputs (batch, tokens, heads, width).

    All queries attend to the first `length` keys, causally, and those after `length` also to the other keys, with
    `bias` (batch, 1, rest, rest) of 0 and -65504. Softmax over both sets is the two outputs weighted by their shares of
    the sum of exponentials (Milakov & Gimelshein, arXiv 1805.02867). The gradient of one set needs of the other only the
    merged output and log-sum-exp (Liu et al., arXiv 2310.01889), so that each key's is computed once and nothing as
    long as the prefix is added.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, length: int, scale: float | None
    ) -> Tensor:
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
        query, key, value, bias, attended, logsumexp = ctx.saved_tensors
        length, scale = ctx.length, ctx.scale
        out, grad = attended.transpose(1, 2), grad.contiguous().transpose(1, 2)
        of_prefix = key[:, :, :length], value[:, :, :length]
        grad_query, *prefix_grads = attention_backward(grad, query, *of_prefix, out, logsumexp, None, scale)
        of_rest = [state[:, :, length:] for state in (grad, query, key, value, out)]
        rest_logsumexp = logsumexp[:, :, length:].contiguous()
        rest_grad_query, *rest_grads = attention_backward(*of_rest, rest_logsumexp, bias, scale)
        grad_query[:, :, length:] += rest_grad_query
        return grad_query, *map(concatenate_tokens, prefix_grads, rest_grads), None, None, None


def attention_with_logsumexp(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and the natural logarithm of the sum of exponentials: (batch, heads, tokens) or, of cuDNN, (..., 1).

    Without `bias` query i sees the keys up to i.
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
    """Gradients of queries, keys and values; `out` and `log_sum` may be of more keys than these."""
    if query.is_cuda:
        no_dropout = logsumexp.new_empty((), dtype=torch.int64)  # in place of its seed and offset
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, logsumexp, no_dropout, no_dropout, bias, None, None,
            query.shape[2], key.shape[2], 0.0, bias is None, scale=scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsumexp, 0.0, bias is None, attn_mask=bias, scale=scale
    )


def concatenate_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Along the tokens; (batch, tokens, heads, width) in memory, as the layer below reads it."""
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


class SplitPrefix(torch.autograd.Function):
    """Queries, keys, values (batch, heads, tokens, width) -> the prefix's of each, the other queries, all keys, all values.

    Where `merges` says no. Slices would do the same, but their gradients are padded with zeros and then added: in a
    model of 7 billion those passes over memory took 17 ms of a step of 284.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, ...]:
        of_prefix = (state[:, :, :length] for state in (query, key, value))
        return *of_prefix, query[:, :, length:], key, value

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
        # Attention has just made these two, and nobody else has them.
        key[:, :, : prefix_key.shape[2]] += prefix_key
        value[:, :, : prefix_value.shape[2]] += prefix_value
        return concatenate_tokens(prefix_query, rest_query), key, value, None


def branch_mask(branch_ids: Tensor, attention: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """(sequences, tokens) -> who sees whom: what came before, in the prefix or in the same dialogue.

    sdpa: booleans (sequences, 1, tokens, tokens); eager: 0 or the least number of `dtype`; flex: a block mask.
    """
    sequences, tokens = branch_ids.shape

    def seen(sequence, head, query, key):
        other, own = branch_ids[sequence, key], branch_ids[sequence, query]
        return (key <= query) & ((other == own) | (other == PREFIX))

    if attention == "flex_attention":
        return create_block_mask(seen, sequences, None, tokens, tokens, device=branch_ids.device)
    own, other = branch_ids[:, :, None], branch_ids[:, None, :]
    places = torch.arange(tokens, device=branch_ids.device)
    mask = ((places[None, :] <= places[:, None]) & ((other == own) | (other == PREFIX)))[:, None]
    if attention != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
