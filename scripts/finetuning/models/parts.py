"""The parts of a model by name: language model, projector, vision tower, decoder layers; their modules and parameters."""

from collections import Counter

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetuning import upstream

# Part of the model -> name of its module in transformers' LLaVA. Everything else (with `lm_head`) is the language model.
MODULE_OF = {"projector": "multi_modal_projector", "vision_tower": "vision_tower"}


def base_model_of(model: nn.Module) -> nn.Module:
    """transformers' model inside PEFT's; without PEFT the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The language model's layers, first to last; those of a vision tower are no part of it."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and "vision_tower" not in name
    ]


def frozen_tower_of(model: nn.Module) -> nn.Module | None:
    """The vision tower, if there is one and nothing of it is trained."""
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)
    return None if tower is None or any(parameter.requires_grad for parameter in tower.parameters()) else tower


def part_of(name: str) -> str:
    """Part of the model that a parameter or module belongs to, by its full name."""
    return next((part for part, module in MODULE_OF.items() if module in name.split(".")), "language_model")


def parts_of(model: nn.Module) -> list[str]:
    present = {part_of(name) for name, _ in model.named_parameters()}
    return [part for part in ("language_model", "projector", "vision_tower") if part in present]


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Part -> `{"trainable": n, "lora": n, "total": n}`; a 4-bit weight counts as the numbers it stands for."""
    counts: dict[str, Counter] = {part: Counter(trainable=0, lora=0, total=0) for part in parts_of(model)}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # PEFT keeps what was there before a part was trained in full
            continue
        # bitsandbytes packs two 4-bit numbers into a byte, and says so in `quant_state` once it has quantised.
        quant_state = getattr(parameter, "quant_state", None)
        # ZeRO-3 leaves an empty tensor where a divided weight was, and says how large it is in `ds_numel`.
        size = (
            quant_state.shape.numel() if quant_state is not None else getattr(parameter, "ds_numel", parameter.numel())
        )
        part = counts[part_of(name)]
        part["total"] += size
        part["trainable"] += size if parameter.requires_grad else 0
        part["lora"] += size if parameter.requires_grad and "lora_" in name else 0
    return {part: dict(count) for part, count in counts.items()}


def cache_named_parameters(module: nn.Module) -> None:
    """Whoever asks for all parameters walks through no modules: DeepSpeed asks several times a step, transformers twice."""
    walk, parameters = module.named_parameters, list(module.named_parameters())

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        return walk(prefix, recurse, remove_duplicate) if prefix or not recurse else iter(parameters)

    upstream.replace(module, "named_parameters", named_parameters)


def switch_mode_only_on_change(model: nn.Module) -> None:
    """Let `model.train()`, which transformers calls at every step, visit thousands of modules only when it must."""
    switch, switched_to = model.train, None

    def train(mode: bool = True) -> nn.Module:
        # The model's own `training` says nothing of its parts: a loaded base in a new PeftModel is still evaluating.
        nonlocal switched_to
        if mode != switched_to:
            switched_to = mode
            switch(mode)
        return model

    upstream.replace(model, "train", train)
