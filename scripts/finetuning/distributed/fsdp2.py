"""FSDP2: which modules it wraps, and what stays in fp32."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from finetuning import upstream
from finetuning.models.parts import base_model_of, frozen_tower_of


def set_wrap_classes(model: nn.Module) -> None:
    """FSDP2 divides and gathers each layer in one piece, found by the name of its class: those that `model` has.

    All layers of a vision tower that is frozen are one piece: they run once a step, and each piece keeps the host for
    milliseconds. (The tower itself as a piece would lose the hidden states that transformers hands out beside its output.)
    """
    base = base_model_of(model)
    tower = frozen_tower_of(model)
    within_tower = set() if tower is None else set(tower.modules())
    pieces = {
        type(module).__name__
        for module in base.modules()
        if module not in within_tower and any(kind.__name__ in base._no_split_modules for kind in type(module).__mro__)
    }
    holders = (module for module in within_tower if any(isinstance(part, nn.ModuleList) for part in module.children()))
    upstream.replace(base, "_no_split_modules", sorted(pieces | {type(holder).__name__ for holder in holders}))


def keep_fp32_reductions(plugin: Any, *, quantised: bool) -> None:
    """FSDP2: gradients are averaged, and the loss is, in fp32 as under DDP; 4-bit weights arrive as they were sent.

    accelerate has all of it in the run's 16 bits. Pairs of bytes of a 4-bit weight that say NaN in bf16, one in a
    thousand, then arrive as 7FFF, which are other weights (bitsandbytes#1945, pytorch#159333). They arrive whole when they
    are stored as fp32, as `preflight` demands, and nothing is cast before it is sent.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        sent = None if quantised else policy.param_dtype
        exact = replace(policy, param_dtype=sent, reduce_dtype=torch.float32, output_dtype=None)
        upstream.replace(plugin, "mixed_precision_policy", exact)
