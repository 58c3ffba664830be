"""Sharded frozen layers, all-gathered into two buffers, compute what replicated layers do.

One process, which gathers from itself; two are in test_strategies.py.
"""

import pytest
import torch
import torch.distributed as dist

from finetuning.distributed.sharded_layers import can_shard_layers, frozen_weights, num_sharded, shard_layers
from finetuning.kernels.lora_layers import fuse_lora, projection_stacks
from finetuning.models.parts import decoder_layers
from support.tiny_models import DECODER, LANGUAGE_MODEL, llava_batch, lora_grads, tiny_gemma, tiny_llava, with_lora


@pytest.fixture(autouse=True)
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses_and_gradients(model, batch, checkpointing: dict | None):
    """Of two steps on different rows, with an answer between them: a buffer that is not refilled in time would show."""
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    found = []
    for flipped in (False, True):
        rows = {key: value.flip(0) if flipped else value[:1] for key, value in batch.items()}
        loss = model(**rows, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            seen = {key: value for key, value in rows.items() if key != "labels"}
            answer = model(**seen, use_cache=False).logits[:, -1]
        found += [loss.detach(), answer, *lora_grads(model).values()]
        model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llava, LANGUAGE_MODEL), (tiny_gemma, DECODER)])
@pytest.mark.slow
def test_sharded_layers_compute_what_replicated_ones_do(make, targets, checkpointing):
    batch = llava_batch()
    if make is tiny_gemma:
        batch.pop("pixel_values")
    models = [with_lora(make(), targets) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        assert fuse_lora(model) == 21
    layers = decoder_layers(models[1])
    before = sum(weight.numel() for weight in models[1].parameters())
    shard_layers(models[1], layers, torch.device("cpu"), from_first=True)
    # Nobody else sees them, and three layers have memory for two.
    assert not any(frozen_weights(layer) for layer in layers)
    assert sum(weight.numel() for weight in models[1].parameters()) + num_sharded(models[1]) == before
    bases = [stack.frozen.bases[0].weight for layer in layers for stack in projection_stacks(layer)]
    assert len(bases) == 12 and len({weight.untyped_storage().data_ptr() for weight in bases}) == 2
    expected, found = (losses_and_gradients(model, batch, checkpointing) for model in models)
    assert len(expected) == 2 * (2 + 42)
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


def test_layers_whose_weights_pytorch_saves_for_backward_are_not_sharded():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL)
    assert not can_shard_layers(decoder_layers(model))
    fuse_lora(model)
    assert can_shard_layers(decoder_layers(model))
