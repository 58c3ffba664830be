"""One picture, many questions, paid once: dialogues about the same image train as one sequence.

    [image prefix | dialogue 1 | dialogue 2 | ...]

Every dialogue attends to the prefix and to itself, and its positions go on from the prefix, so that loss and gradients
are those of separate rows, while 576 image tokens, the vision tower and the decoding are paid once per image. Prefix
Grouper (arXiv 2506.05433) shows the same for GRPO. A dialogue's last token is only predicted: it is a label, and no
token of the sequence unless the sequence ends with it.
"""

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import BlockMask, sdpa_mask
from transformers.utils import is_torch_flex_attn_available
from trl.data_utils import prepare_multimodal_messages

from finetuning.data.collator import LlavaDataCollator
from finetuning.models.loading import base_model_of

if is_torch_flex_attn_available():
    from torch.nn.attention.flex_attention import create_block_mask

NAME = "shared_prefix"
# Marks of `branch_ids`: every dialogue has a number of its own from FIRST_BRANCH on.
PADDING, PREFIX, FIRST_BRANCH = 0, 1, 2


def group_by_image(dataset: Dataset, max_dialogues: int = 8) -> Dataset:
    """Rows with the same `image_id` -> one row with `messages` (the first dialogue), `other_messages`, `images`, `row`.

    An image with more dialogues than `max_dialogues` becomes several rows, so that no sequence grows without bound.
    Rows without images stay alone. Pictures are read when a row is asked for, once per row.
    """
    image_ids, counts = dataset["image_id"], [len(images) for images in images_as_stored(dataset)]
    rows_of: dict[Any, list[int]] = defaultdict(list)
    for row, (image_id, count) in enumerate(zip(image_ids, counts, strict=True)):
        rows_of[image_id if count else ("no image", row)].append(row)
    groups = [
        rows[start : start + max_dialogues] for rows in rows_of.values() for start in range(0, len(rows), max_dialogues)
    ]
    texts = dataset["messages"]
    sizes = [sum(len(message["content"]) for message in messages) for messages in texts]
    characters = [sum(sizes[row] for row in rows) for rows in groups]
    grouped = Dataset.from_dict({"rows": groups, "characters": characters})
    grouped.set_transform(partial(read_groups, dataset))
    return grouped


def images_as_stored(dataset: Dataset) -> list[list]:
    # The column as bytes: nothing is decoded to count pictures.
    return dataset.with_format("arrow")["images"].to_pylist()


def read_groups(dataset: Dataset, batch: dict[str, list]) -> dict[str, list]:
    texts = dataset.select_columns([name for name in dataset.column_names if name != "images"])
    dialogues = [texts[rows]["messages"] for rows in batch["rows"]]
    return {
        "messages": [messages[0] for messages in dialogues],
        "other_messages": [messages[1:] for messages in dialogues],
        "images": [dataset[rows[0]]["images"] for rows in batch["rows"]],
        "row": [rows[0] for rows in batch["rows"]],
    }


class SharedPrefixCollator(LlavaDataCollator):
    """Rows of `group_by_image` -> one batch of sequences, each an image prefix and its dialogues.

    `input_ids`, `labels`, `attention_mask`, `position_ids` and `branch_ids` are (sequences, tokens), right-padded;
    `pixel_values` holds each picture once. `prefix_length` (int) is there when all prefixes are as long. As in any batch,
    a label is what the position before it predicts; the token at the label's own position may be of the next dialogue.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        image_token = self.processor.image_token_id
        sequences = []
        for position, example in enumerate(examples):
            real = batch["attention_mask"][position].bool()
            tokens, labels = batch["input_ids"][position][real], batch["labels"][position][real]
            image_places = (tokens == image_token).nonzero()
            prefix = int(image_places[-1]) + 1 if len(image_places) else 0
            dialogues = [(tokens, labels)]
            for messages in example.get("other_messages", []):
                dialogues.append(self.tokenize(messages, example["images"], len(image_places)))
            sequences.append(join(dialogues, prefix, example.get("row")))
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(sequence["input_ids"]) for sequence in sequences) // multiple) * multiple
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        for name in sequences[0]:
            rows = torch.full((len(sequences), length), padding.get(name, 0))
            for row, sequence in zip(rows, sequences, strict=True):
                row[: len(sequence[name])] = sequence[name]
            batch[name] = rows
        prefixes = {int((branch_ids == PREFIX).sum()) for branch_ids in batch["branch_ids"]}
        if len(prefixes) == 1 and prefixes != {0}:
            batch["prefix_length"] = prefixes.pop()
        return batch

    def tokenize(self, messages: list[dict], images: list, num_image_tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels of a dialogue, with the picture's tokens but without reading the picture again."""
        encoded = self.processor.tokenizer.apply_chat_template(
            prepare_multimodal_messages(messages, images=images),
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            add_special_tokens=False,
        )
        tokens, supervised = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"])
        is_image = tokens == self.processor.image_token_id
        repeats = torch.where(is_image, num_image_tokens // max(int(is_image.sum()), 1), 1)
        labels = torch.where(supervised == 1, tokens, -100)
        return tokens.repeat_interleave(repeats), labels.repeat_interleave(repeats)


def join(dialogues: list[tuple[Tensor, Tensor]], prefix: int, row: int | None) -> dict[str, Tensor]:
    """(token ids, labels) of each dialogue, `prefix` tokens of which are common -> one sequence with branches.

    The last token of a dialogue predicts nothing, and no other dialogue sees it. Its label takes the place of the next
    dialogue's first, which is none.

    Raises ValueError if the dialogues do not begin alike, or if the first token after the prefix is supervised: it
    would be predicted from the end of another dialogue.
    """
    first = dialogues[0][0]
    for tokens, labels in dialogues:
        if not torch.equal(tokens[:prefix], first[:prefix]):
            raise ValueError(
                f"row {row}: dialogues about one image begin differently (another system message, or text before the "
                "image): set share_image_prefix: false, or give these rows an image_id of their own"
            )
        if (labels[:prefix] != -100).any() or (len(dialogues) > 1 and labels[prefix] != -100):
            raise ValueError(
                f"row {row}: an answer comes before or directly after the image; it must follow a question"
            )
    *others, last = [tokens[prefix:] for tokens, _ in dialogues]
    branches = [*(tokens[:-1] for tokens in others), last]
    return {
        "input_ids": torch.cat([first[:prefix], *branches]),
        "labels": torch.cat([dialogues[0][1], *(labels[prefix + 1 :] for _, labels in dialogues[1:])]),
        "attention_mask": torch.ones(prefix + sum(map(len, branches)), dtype=torch.long),
        "position_ids": torch.cat([torch.arange(prefix), *(prefix + torch.arange(len(branch)) for branch in branches)]),
        "branch_ids": torch.cat(
            [torch.full((prefix,), PREFIX)]
            + [torch.full((len(branch),), FIRST_BRANCH + number) for number, branch in enumerate(branches)]
        ),
    }


def share_prefix(model: nn.Module) -> None:
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
    language_model.register_forward_pre_hook(mask_branches, with_kwargs=True)


def mask_branches(language_model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
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
    if merges(query, key, value, **kwargs):
        of_rest = attention_mask[:, :, prefix_length:, prefix_length:]
        # Not -inf, which cuDNN takes badly; exp() of it is 0 all the same.
        bias = torch.where(of_rest, 0.0, -65504.0).to(query.dtype)
        key, value = (repeat_kv(state, query.shape[1] // state.shape[1]) for state in (key, value))
        return MergedAttention.apply(query, key, value, bias, prefix_length, kwargs.get("scaling")), None
    *of_prefix, rest_query, key, value = SplitPrefix.apply(query, key, value, prefix_length)
    prefix, _ = sdpa_attention_forward(module, *of_prefix, None, **kwargs)
    rest, _ = sdpa_attention_forward(module, rest_query, key, value, attention_mask[:, :, prefix_length:], **kwargs)
    return torch.cat([prefix, rest], dim=1), None


def merges(
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
        out, log_sum = attend(query, key[:, :, :length], value[:, :, :length], None, scale)
        rest_out, rest_log_sum = attend(*(state[:, :, length:] for state in (query, key, value)), bias, scale)
        prefix_out, prefix_log_sum = out[:, :, length:], log_sum[:, :, length:]
        rest_share = torch.sigmoid(rest_log_sum - prefix_log_sum).view(*rest_out.shape[:3], 1)
        torch.addcmul(prefix_out * (1 - rest_share), rest_out, rest_share, out=prefix_out)
        torch.logaddexp(prefix_log_sum, rest_log_sum, out=prefix_log_sum)
        attended = out.transpose(1, 2)
        ctx.save_for_backward(query, key, value, bias, attended, log_sum)
        ctx.length, ctx.scale = length, scale
        return attended

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, attended, log_sum = ctx.saved_tensors
        length, scale = ctx.length, ctx.scale
        out, grad = attended.transpose(1, 2), grad.contiguous().transpose(1, 2)
        of_prefix = key[:, :, :length], value[:, :, :length]
        grad_query, *prefix_grads = attend_backward(grad, query, *of_prefix, out, log_sum, None, scale)
        of_rest = [state[:, :, length:] for state in (grad, query, key, value, out)]
        rest_log_sum = log_sum[:, :, length:].contiguous()
        rest_grad_query, *rest_grads = attend_backward(*of_rest, rest_log_sum, bias, scale)
        grad_query[:, :, length:] += rest_grad_query
        return grad_query, *map(one_after_the_other, prefix_grads, rest_grads), None, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs, and the natural logarithm of the sum of exponentials: (batch, heads, tokens) or, of cuDNN, (..., 1).

    Without `bias` query i sees the keys up to i.
    """
    if query.is_cuda:
        out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, compute_log_sumexp=True, is_causal=bias is None, scale=scale
        )
        return out, log_sum
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=bias is None, attn_mask=bias, scale=scale
    )


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    bias: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `out` and `log_sum` may be of more keys than these."""
    if query.is_cuda:
        no_dropout = log_sum.new_empty((), dtype=torch.int64)  # in place of its seed and offset
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, log_sum, no_dropout, no_dropout, bias, None, None,
            query.shape[2], key.shape[2], 0.0, bias is None, scale=scale,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, log_sum, 0.0, bias is None, attn_mask=bias, scale=scale
    )


def one_after_the_other(first: Tensor, second: Tensor) -> Tensor:
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
        return one_after_the_other(prefix_query, rest_query), key, value, None


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
