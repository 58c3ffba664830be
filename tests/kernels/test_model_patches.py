"""Patches of transformers' models compute what the models do."""

import pytest
import torch

from finetuning.kernels.lora_layers import fuse_lora
from finetuning.kernels.model_patches import ignore_right_padding, vision_tower_without_autocast
from support.tiny_models import (
    DECODER,
    LANGUAGE_MODEL,
    assert_same,
    llava_batch,
    loss_and_grads,
    text_batch,
    tiny_gemma,
    tiny_llava,
    with_lora,
)


@pytest.mark.parametrize("fused", [False, True])
def test_the_mask_of_right_padding_changes_nothing(fused):
    model = with_lora(tiny_gemma(), DECODER).train()
    batch = text_batch()
    assert batch["attention_mask"].sum() == 33  # of 40: seven are padding
    expected = loss_and_grads(model, batch)
    if fused:
        fuse_lora(model)
    ignore_right_padding(model)
    masks = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(copy_tensors, with_kwargs=True, prepend=True)
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    assert_same(loss_and_grads(model, batch), expected)
    assert masks == [None] * 3


def copy_tensors(module, args, kwargs):
    """What FSDP2 does first of all when it moves a layer's inputs to its GPU."""
    return args, {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


def test_a_frozen_tower_sees_in_training_what_it_sees_in_inference():
    model = with_lora(tiny_llava().to(torch.bfloat16), LANGUAGE_MODEL).train()
    pixels = llava_batch()["pixel_values"]

    model_of_images = model.get_base_model().model
    mixed = []
    model_of_images.vision_tower.embeddings.register_forward_hook(
        lambda *_: mixed.append(torch.is_autocast_enabled("cpu"))
    )

    def features() -> torch.Tensor:
        return torch.cat(model_of_images.get_image_features(pixels).pooler_output)

    expected = features()
    with torch.autocast("cpu", torch.bfloat16):
        features()
        vision_tower_without_autocast(model)
        assert torch.equal(features(), expected)
    assert mixed == [False, True, False]
