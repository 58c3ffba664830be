"""Trained weights made whole again where a strategy divides them between the processes."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetuning.hardware import strategy


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole weight on the CPU, for the trainable weights only: the frozen base is never gathered.

    Called by all processes together. Under DeepSpeed these are the fp32 masters that the optimizer steps, not the
    16-bit copies that the model computes with, so that an adapter is saved alike under every strategy.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if strategy().startswith("ZeRO"):
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weights[name] = whole.detach().cpu().clone()
    return weights
