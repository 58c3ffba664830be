"""Dialogues about one image that train as one sequence give the loss and the gradients of separate rows."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetuning.data.shared_prefix import join_dialogues
from finetuning.kernels.lora_layers import fuse_lora
from finetuning.kernels.shared_prefix_attention import (
    branch_mask,
    can_merge_attention,
    enable_shared_prefix,
    shared_prefix_attention,
)
from support.tiny_models import (
    LANGUAGE_MODEL,
    llava_batch,
    lora_grads,
    relative_error,
    tiny_llava,
    with_lora,
)

PREFIX_TOKENS = 20
BRANCH_LENGTHS = [[7, 3, 5], [4, 9]]  # two images, with three and two dialogues


def dialogues_of(image: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of the separate rows of one image."""
    generator = torch.Generator().manual_seed(image)
    prefix = llava_batch(1, PREFIX_TOKENS)["input_ids"][0]
    dialogues = []
    for length in BRANCH_LENGTHS[image]:
        tokens = torch.cat([prefix, torch.randint(3, 99, (length,), generator=generator)])
        labels = tokens.clone()
        labels[: PREFIX_TOKENS + 1] = -100
        dialogues.append((tokens, labels))
    return dialogues


def right_pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def separate_batch(pixel_values: torch.Tensor) -> dict:
    rows = [dialogue for image in range(2) for dialogue in dialogues_of(image)]
    counts = torch.tensor([len(lengths) for lengths in BRANCH_LENGTHS])
    return {
        "input_ids": right_pad([tokens for tokens, _ in rows], 0),
        "labels": right_pad([labels for _, labels in rows], -100),
        "attention_mask": right_pad([torch.ones_like(tokens) for tokens, _ in rows], 0),
        "pixel_values": pixel_values.repeat_interleave(counts, 0),
    }


def shared_batch(pixel_values: torch.Tensor) -> dict:
    sequences = [join_dialogues(dialogues_of(image), PREFIX_TOKENS, image) for image in range(2)]
    padding = {"labels": -100}
    batch = {name: right_pad([s[name] for s in sequences], padding.get(name, 0)) for name in sequences[0]}
    return batch | {"pixel_values": pixel_values}


def mean_loss(model, batch) -> torch.Tensor:
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="mean")


def loss_and_grads(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = mean_loss(model, batch)
    loss.backward()
    return loss.item(), lora_grads(model)


@pytest.mark.parametrize("way", ["eager", "masked", "split", "merged"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_loss_and_gradients_equal_separate_rows(checkpointing, fused, way):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    model = with_lora(tiny_llava("eager" if way == "eager" else "sdpa"), LANGUAGE_MODEL).train()
    loss, grads = loss_and_grads(model, separate_batch(pixel_values))
    enable_shared_prefix(model)
    if fused:
        fuse_lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = shared_batch(pixel_values)
    if way in ("split", "merged"):
        batch["prefix_length"] = PREFIX_TOKENS
    with without_flash() if way == "split" else nullcontext():
        shared_loss, shared_grads = loss_and_grads(model, batch)
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert shared_grads.keys() == grads.keys()
    assert max(relative_error(shared_grads[name], grads[name]) for name in grads) < 1e-5


def without_flash():
    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_merged_attention_is_masked_attention(key_heads):
    branch_ids = right_pad(
        [join_dialogues(dialogues_of(image), PREFIX_TOKENS, image)["branch_ids"] for image in range(2)], 0
    )
    mask = branch_mask(branch_ids, "sdpa", torch.float64)
    generator = torch.Generator().manual_seed(5)
    # (batch, heads, tokens, width), as views of (batch, tokens, heads, width)
    shapes = [(2, branch_ids.shape[1], heads, 8) for heads in (4, key_heads, key_heads, 4)]
    query, key, value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    states = [state.transpose(1, 2).requires_grad_() for state in (query * 3, key, value)]
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // key_heads
    assert can_merge_attention(*states)
    assert not can_merge_attention(*states, dropout=0.1)
    with without_flash():
        assert not can_merge_attention(*states)
    results = []
    for length in (None, PREFIX_TOKENS):
        out, _ = shared_prefix_attention(module, *states, mask, prefix_length=length, scaling=0.3)
        results.append((out, *torch.autograd.grad(out, states, grad)))
    for expected, given in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-13)


def test_flex_attention_and_eager_get_the_same_mask():
    branch_ids = right_pad(
        [join_dialogues(dialogues_of(image), PREFIX_TOKENS, image)["branch_ids"] for image in range(2)], 0
    )
    expected = branch_mask(branch_ids, "sdpa", torch.float32)
    flex = branch_mask(branch_ids, "flex_attention", torch.float32)
    tokens = torch.arange(branch_ids.shape[1])
    sequence = torch.arange(2)[:, None, None]
    assert torch.equal(flex.mask_mod(sequence, 0, tokens[None, :, None], tokens[None, None, :]), expected[:, 0])
    assert torch.equal(branch_mask(branch_ids, "eager", torch.float32) == 0, expected)


@pytest.mark.slow
def test_flex_attention_gives_the_loss_of_separate_rows():
    # The loss alone: on a CPU flex attention passes no gradients.
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    model = tiny_llava().eval()
    with torch.no_grad():
        expected = mean_loss(model, separate_batch(pixel_values))
        model.model.language_model.set_attn_implementation("flex_attention")
        enable_shared_prefix(model)
        shared = mean_loss(model, shared_batch(pixel_values))
    assert shared.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_dialogue_does_not_see_another():
    mask = branch_mask(join_dialogues(dialogues_of(0), PREFIX_TOKENS, 0)["branch_ids"][None], "sdpa", torch.float32)[
        0, 0
    ]
    # Of 7, 3 and 5 tokens; what the first and the second end with is only predicted.
    first, second, third = (slice(20, 26), slice(26, 28), slice(28, 33))
    assert mask.shape == (33, 33)
    assert mask[:, :20][20:].all()  # every dialogue sees the whole prefix
    assert not mask[second, first].any()
    assert not mask[third, first].any()
    assert not mask[third, second].any()
    assert torch.equal(mask[third, third], torch.ones(5, 5).tril().bool())
    assert not mask[:20, 20:].any()


def test_dialogues_that_begin_differently_are_refused():
    dialogues = dialogues_of(0)
    dialogues[1][0][1] += 1
    with pytest.raises(ValueError, match="row 5: dialogues about one image begin differently"):
        join_dialogues(dialogues, PREFIX_TOKENS, 5)
    dialogues = dialogues_of(0)
    dialogues[1][1][PREFIX_TOKENS] = 7
    with pytest.raises(ValueError, match="directly after the image"):
        join_dialogues(dialogues, PREFIX_TOKENS, 5)


def test_an_attention_without_masks_is_refused():
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set attn_implementation to sdpa"):
        enable_shared_prefix(model)
