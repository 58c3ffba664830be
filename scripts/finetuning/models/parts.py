"""Parts of a model: language model, projector, vision tower and decoder layers, with their modules and parameters."""

from collections import Counter

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from finetuning import upstream

# Part -> name of its module in transformers' LLaVA. Everything else (with `lm_head`) is the language model.
MODULE_OF = {"projector": "multi_modal_projector", "vision_tower": "vision_tower"}
# Vectors beside the projector's that pictures are laid out with: LLaVA-NeXT's end of a row of patches.
PICTURE_PARAMETERS = ("image_newline",)


def base_model_of(model: nn.Module) -> nn.Module:
    """transformers' model inside of a PeftModel; the model itself if it is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_sliding_window(config: PreTrainedConfig) -> bool:
    """Whether layers of the language model (`config` is its own) see only so many tokens back, as Mistral 7B v0.1's do."""
    return getattr(config, "sliding_window", None) is not None


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of the language model, first to last, without those of a vision tower."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and "vision_tower" not in name
    ]


def frozen_tower_of(model: nn.Module) -> nn.Module | None:
    """The vision tower, if there is one and all of its parameters are frozen."""
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)
    return None if tower is None or any(parameter.requires_grad for parameter in tower.parameters()) else tower


def part_of(name: str) -> str:
    """The part (`language_model`, `projector`, `vision_tower`) of a parameter or module, by its full name."""
    names = name.split(".")
    if names[-1] in PICTURE_PARAMETERS:
        return "projector"
    return next((part for part, module in MODULE_OF.items() if module in names), "language_model")


def parts_of(model: nn.Module) -> list[str]:
    """The parts that the model has parameters of; a text model has `language_model` only."""
    present = {part_of(name) for name, _ in model.named_parameters()}
    return [part for part in ("language_model", "projector", "vision_tower") if part in present]


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Part -> `{"trainable": n, "lora": n, "total": n}`; 4-bit and sharded weights count in full."""
    counts: dict[str, Counter] = {part: Counter(trainable=0, lora=0, total=0) for part in parts_of(model)}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT's frozen copy of a part that is trained in full
            continue
        # bitsandbytes packs two 4-bit values into a byte; `quant_state` has the original shape.
        quant_state = getattr(parameter, "quant_state", None)
        # ZeRO-3 leaves an empty tensor in place of a sharded weight, and its full size in `ds_numel`.
        size = (
            quant_state.shape.numel() if quant_state is not None else getattr(parameter, "ds_numel", parameter.numel())
        )
        part = counts[part_of(name)]
        part["total"] += size
        part["trainable"] += size if parameter.requires_grad else 0
        part["lora"] += size if parameter.requires_grad and "lora_" in name else 0
    return {part: dict(count) for part, count in counts.items()}


def cache_named_parameters(module: nn.Module) -> None:
    """Let `module.named_parameters()` return a list made now, in place; no parameter may be replaced afterwards.

    It walks through thousands of modules otherwise. DeepSpeed calls it several times a step, transformers twice.
    """
    walk, parameters = module.named_parameters, list(module.named_parameters())

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        return walk(prefix, recurse, remove_duplicate) if prefix or not recurse else iter(parameters)

    upstream.replace(module, "named_parameters", named_parameters)


def switch_mode_only_on_change(model: nn.Module) -> None:
    """Let `model.train(mode)` visit modules only when `mode` changes, in place: transformers calls it each step."""
    switch, switched_to = model.train, None

    def train(mode: bool = True) -> nn.Module:
        # The model's own `training` flag is no guide: a new PeftModel is in training mode, its loaded base is not.
        nonlocal switched_to
        if mode != switched_to:
            switched_to = mode
            switch(mode)
        return model

    upstream.replace(model, "train", train)
