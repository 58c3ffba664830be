"""ZeRO-3 and FSDP2 with LoRA: frozen decoder layers are sharded here, and all else is trained as under DDP.

Both libraries work through each parameter in Python. Of 448 adapters and a tower's 400 weights FSDP2 made a step of 420 ms
out of 250, DeepSpeed's hooks one of 274 (two H200s). They have what is trained in full, PEFT's own code, and offload.
"""

import os

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetuning.arguments import TrainingArguments
from finetuning.distributed.gradient_average import average_behind_backward
from finetuning.distributed.sharded_layers import can_shard_layers, shard_layers
from finetuning.models.parts import decoder_layers
from finetuning.strategy import SHARDS_LAYERS_ONLY, Strategy


def shard_layers_only(model: nn.Module, training_args: TrainingArguments) -> bool:
    """Take over from ZeRO-3 or FSDP2 before the Trainer exists, where the layers allow it; False where nothing is done.

    Changes `model`, `training_args` and the environment: accelerate then sees DDP. Trained weights become fp32.
    """
    strategy, layers = Strategy.from_environment(), decoder_layers(model)
    takes_over = strategy.shards_weights and not strategy.offloads and dist.is_initialized()
    if not takes_over or not can_shard_layers(layers):
        return False
    device = PartialState().device
    shard_layers(model, layers, device, from_first=strategy.is_fsdp)
    if strategy.is_deepspeed:
        leave_deepspeed(training_args)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    average_behind_backward(model.to(device), layers[-1])
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ[SHARDS_LAYERS_ONLY] = strategy.kind
    return True


def leave_deepspeed(training_args: TrainingArguments) -> None:
    """Let transformers and accelerate forget that the launch was one of DeepSpeed; its process group stays."""
    unset_hf_deepspeed_config()
    training_args.deepspeed_plugin = None
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    state = PartialState()
    state.distributed_type = DistributedType.MULTI_GPU if state.device.type == "cuda" else DistributedType.MULTI_CPU
