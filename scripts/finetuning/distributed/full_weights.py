"""Full weights of a sharded model, to be saved."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from finetuning.strategy import Strategy


def full_trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> full weight on the CPU, of trainable weights only: the frozen base is never all-gathered.

    All processes must call it together. Under DeepSpeed the weights are the optimizer's fp32 masters, not the 16-bit
    copies that the model computes with, so that every strategy saves the same adapter.

    A part trained in full beside LoRA is complete, with the layers that get no gradient (the last of a vision tower):
    PEFT saves such a part in full.
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
    """The full value of a parameter that the optimizer does not know; ZeRO-3 leaves each process a shard of it."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> full weight of a model that FSDP2 shards, all-gathered; called by all processes together.

    A head that is tied to the embeddings would be a copy of them: it is left out, as everywhere else.
    """
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    weights = accelerator.get_state_dict(model)
    return {name: weights[name] for name in weights if name not in tied}
