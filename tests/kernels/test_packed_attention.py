"""Packed rows attend to themselves only, without a mask of length x length: as if each were alone."""

import pytest
import torch

from finetuning.kernels.lora_layers import fuse_lora
from finetuning.kernels.packed_attention import register_packed_attention
from support.tiny_models import DECODER, VOCABULARY, lora_grads, relative_error, tiny_gemma, with_lora

LENGTHS = [5, 9, 3]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def loss_and_grads(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = loss + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    loss.backward()
    return loss.item(), lora_grads(model)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_equal_rows_alone(fused):
    register_packed_attention()
    alone = with_lora(tiny_gemma("sdpa"), DECODER).train()
    loss, grads = loss_and_grads(alone, [{"input_ids": row[None], "labels": row[None]} for row in rows()])
    packed = with_lora(tiny_gemma("packed"), DECODER).train()
    packed.load_state_dict(alone.state_dict())
    if fused:
        fuse_lora(packed)
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows()]
    batch = {
        "input_ids": torch.cat(rows())[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 14, 17], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 14, 17], dtype=torch.int32),
        "max_length_q": 9,
        "max_length_k": 9,
    }
    packed_loss, packed_grads = loss_and_grads(packed, [batch])
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert max(relative_error(packed_grads[name], grads[name]) for name in grads) < 1e-5


def test_padded_batches_are_answered_as_with_sdpa():
    register_packed_attention()
    inputs = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows()], True, padding_side="left")
    answers = [
        tiny_gemma(attention).eval().generate(inputs, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for attention in ("sdpa", "packed")
    ]
    assert torch.equal(*answers)
