"""Patches of transformers' models that save host syncs and passes over memory; they compute the same."""

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from finetuning import upstream
from finetuning.kernels import packed_attention
from finetuning.kernels.lora_layers import without_autocast
from finetuning.kernels.quick_gelu import quick_gelu
from finetuning.models.parts import base_model_of, frozen_tower_of, has_sliding_window

# transformers passes a 4-D mask through unchanged, so an empty one is a sentinel for "no mask" until a layer is
# reached. With None transformers would check for packed rows, which forces a GPU sync.
NO_MASK = torch.empty(0, 0, 0, 0)


def ignore_right_padding(model: nn.Module) -> None:
    """Drop the padding mask of training batches, in place, so that attention runs on kernels without a mask.

    Training batches are padded on the right. Causal attention sees no later token, so padding reaches neither the loss
    nor a gradient.
    """
    base_model = base_model_of(model)
    language_model = getattr(base_model.model, "language_model", base_model.model)
    if has_sliding_window(language_model.config):
        return  # the mask says how far a token sees

    def replace_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.get("attention_mask")
        padded = mask is not None and mask.dim() == 2
        packed = mask is None and module.config._attn_implementation == packed_attention.ATTENTION_NAME
        if module.training and (padded or packed) and upstream.cache_of(kwargs) is None:
            kwargs["attention_mask"] = NO_MASK
        return args, kwargs

    def remove_mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.numel():  # the sentinel or a copy: FSDP2 moves a layer's inputs to its GPU
            kwargs["attention_mask"] = None
        return args, kwargs

    language_model.register_forward_pre_hook(replace_mask, with_kwargs=True)
    for layer in language_model.layers:
        layer.register_forward_pre_hook(remove_mask, with_kwargs=True)


def count_image_tokens_once(model: nn.Module) -> None:
    """Let only the first training pass compare the number of image tokens with that of the features; in place.

    The comparison waits for the GPU to finish the step before. The processor makes a fixed number of tokens for a
    picture, and `LlavaDataCollator` refuses a row that has not one mark for each picture, or other features than tokens.
    """
    llava = base_model_of(model).model
    if not hasattr(llava, "get_placeholder_mask"):
        return
    with_check, checked = llava.get_placeholder_mask, False
    sees_videos = hasattr(llava, "get_video_features")  # OneVision: a second mask is for them

    def get_placeholder_mask(input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor):
        nonlocal checked
        if llava.training and checked:
            mask = (input_ids == llava.config.image_token_id).unsqueeze(-1)
            return (mask, None) if sees_videos else mask
        checked = llava.training
        return with_check(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)

    upstream.replace(llava, "get_placeholder_mask", get_placeholder_mask)


def vision_tower_without_autocast(model: nn.Module) -> None:
    """Run a frozen 16-bit vision tower in its own dtype, as inference does, with a fused QuickGELU; in place.

    Autocast would upcast its activations to fp32 between the products, which only trained weights need.
    """
    tower = frozen_tower_of(model)
    if tower is None or tower.dtype == torch.float32:
        return
    forward = tower.forward

    def forward_without_autocast(pixel_values: Tensor, *args, **kwargs):
        with without_autocast(pixel_values):
            return forward(pixel_values, *args, **kwargs)

    upstream.replace(tower, "forward", forward_without_autocast)
    for module in tower.modules():
        if isinstance(module, QuickGELUActivation):
            upstream.replace(module, "forward", quick_gelu)
