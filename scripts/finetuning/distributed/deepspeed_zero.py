"""DeepSpeed ZeRO: what its configuration cannot say, and steps that do not wait for the host."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from finetuning import upstream
from finetuning.distributed.sharded_layers import can_shard_layers, shard_layers
from finetuning.models.parts import cache_named_parameters, decoder_layers, frozen_tower_of


def set_up_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """What a strategy's file cannot say because it follows from the model; changes DeepSpeed's `config` in place."""
    zero = config["zero_optimization"]
    disable_host_syncs(config)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # PyTorch's own AdamW steps on the CPU too. DeepSpeed's would be compiled at first use, by a CUDA toolkit that
        # few machines have (DeepSpeed#2772).
        from deepspeed.runtime.constants import ZERO_FORCE_DS_CPU_OPTIMIZER

        config[ZERO_FORCE_DS_CPU_OPTIMIZER] = False
    if zero["stage"] == 3:
        layers = decoder_layers(model)
        if zero.get("offload_param", {}).get("device", "none") == "none" and can_shard_layers(layers):
            # What is left to DeepSpeed is trained: its optimizer and its gradients are divided.
            shard_layers(model, layers)
            zero["stage"] = 2
        else:
            all_gather_whole_layers(model, zero)
    if zero["stage"] < 3:
        # Averaged where they lie: DeepSpeed's way of scattering them sends as much, and copies them before and after.
        zero["reduce_scatter"] = False
    cache_named_parameters(model)


def disable_host_syncs(config: dict[str, Any]) -> None:
    """Nothing in a step that waits for the GPU, or walks through the whole model, to no end."""
    # DeepSpeed times each forward pass and each step for a report that nobody asked for, and waits for the GPU to do so.
    from deepspeed.utils.config import TIMERS, TIMERS_THROUGHPUT

    config[TIMERS] = {TIMERS_THROUGHPUT: {"enabled": False}}
    if config.get("bf16", {}).get("enabled"):
        # What is not finite stops the run by its loss, as under DDP. DeepSpeed would look at every gradient, and at the
        # norm, before each step; a norm that is not finite clips to nothing either way.
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        config["bf16"]["check_grad_overflow"] = False
        for module in (stage_1_and_2, stage3):
            upstream.replace(module, "is_invalid_grad_norm", lambda norm: False)


def all_gather_whole_layers(model: nn.Module, zero: dict[str, Any]) -> None:
    """ZeRO-3: gather a decoder layer, and a frozen vision tower, in one piece each, the next one during this one.

    Left alone, DeepSpeed gathers each linear layer and each adapter by a call of its own, from hooks that take longer
    than the products between them: LoRA then trains at a quarter of DDP's speed. Here a layer's weights, adapters and
    norms come in one message, and what is fetched ahead is one layer.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers, tower = decoder_layers(model), frozen_tower_of(model)
    for module in layers if tower is None else [*layers, tower]:
        set_z3_leaf_module(module, True)
        cache_named_parameters(module)
    layers[0].register_forward_pre_hook(require_input_grad)
    zero["stage3_prefetch_bucket_size"] = max(
        sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in layer.parameters()) for layer in layers
    )
    # What stays whole on every GPU is divided and gathered again after each step, one small tensor at a time.
    zero["stage3_param_persistence_threshold"] = 0


def require_input_grad(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # DeepSpeed takes a layer's gradients when that of its input is there, so that the first layer's input must have one.
    # (transformers' `enable_input_require_grads` would also send one through the whole vision tower.)
    hidden_states, *others = args
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states = hidden_states.detach().requires_grad_()
    return hidden_states, *others


def shorten_optimizer_step(engine: Any) -> None:
    """ZeRO-1 and 2, once training has begun: nothing at the end of a step waits for the GPU, or is done per parameter.

    The 16-bit parameters stay the views of one flat tensor that they are: DeepSpeed makes all of them anew after each step,
    "just to be safe" as its source says. The norm of the gradients is left on the GPU: DeepSpeed computes it one parameter
    after the other in fp64, and copies a constant to the GPU to compare it with, which waits for the whole step. In fp16,
    whose loss scale follows that norm, and where the optimizer is on the CPU, DeepSpeed's norm stays.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    upstream.replace(optimizer, "_update_model_bit16_weights", lambda group_index: None)
    if optimizer.dtype != torch.float16 and not optimizer.cpu_offload:
        upstream.replace(optimizer, "scaled_global_norm", partial(sharded_grad_norm, optimizer))


def sharded_grad_norm(optimizer: Any) -> torch.Tensor:
    """The L2 norm (fp32 scalar) of the averaged gradients, of which each process has a part."""
    parts = [part for group in optimizer.averaged_gradients.values() for part in group]
    total = torch.stack(torch._foreach_norm(parts, 2, torch.float32)).square().sum()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()
