"""The full weights of a sharded model, to be saved."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from finetuning.strategy import Strategy


def full_trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole weight on the CPU, for the trainable weights only: the frozen base is never gathered.

    Of a part that is trained in full beside LoRA also the layers that no gradient reaches (the last of a vision tower):
    PEFT saves such a part as a whole.

    Called by all processes together. Under DeepSpeed these are the fp32 masters that the optimizer steps, not the
    16-bit copies that the model computes with, so that an adapter is saved alike under every strategy.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if Strategy.from_environment().is_deepspeed and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(parameter)
        elif parameter.requires_grad or ".modules_to_save." in name:
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else all_gather_parameter(parameter)
        else:
            continue
        weights[name] = full.detach().cpu().clone()
    return weights


def all_gather_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter that the optimizer does not know, whole also under ZeRO-3, which leaves each process a share."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
