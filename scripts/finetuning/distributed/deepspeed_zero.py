"""DeepSpeed ZeRO: settings that follow from the model, and steps in which the host never waits for the GPU."""

import re
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from finetuning import upstream
from finetuning.models.parts import cache_named_parameters, decoder_layers, frozen_tower_of


def set_up_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """Complete DeepSpeed's `config` by what follows from `model`; changes both in place, before the engine exists."""
    zero = config["zero_optimization"]
    disable_host_syncs(config)
    read_tensors_only()
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # PyTorch's AdamW steps on the CPU too. DeepSpeed compiles its own at first use, with a CUDA toolkit that few
        # machines have (DeepSpeed#2772).
        from deepspeed.runtime.constants import ZERO_FORCE_DS_CPU_OPTIMIZER

        config[ZERO_FORCE_DS_CPU_OPTIMIZER] = False
    if zero["stage"] == 3:
        all_gather_whole_layers(model, zero)
    else:
        # All-reduce in place. DeepSpeed's reduce-scatter sends as much, and copies gradients before and after.
        zero["reduce_scatter"] = False
    cache_named_parameters(model)


def disable_host_syncs(config: dict[str, Any]) -> None:
    """Switch off DeepSpeed's timers and, in bf16, its search for gradients that are not finite; edits `config`.

    In bf16 the loss stops a run that diverges, as under DDP, and a norm that is not finite clips nothing either way.
    """
    from deepspeed.utils.config import TIMERS, TIMERS_THROUGHPUT

    # The timers synchronize the GPU at each forward pass and step, for a report that nobody asked for.
    config[TIMERS] = {TIMERS_THROUGHPUT: {"enabled": False}}
    if config.get("bf16", {}).get("enabled"):
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        config["bf16"]["check_grad_overflow"] = False
        for module in (stage_1_and_2, stage3):
            upstream.replace(module, "is_invalid_grad_norm", lambda norm: False)


def read_tensors_only() -> None:
    """Let DeepSpeed read its checkpoints with `weights_only`: it would run whatever code is pickled in them."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    upstream.replace(TorchCheckpointEngine, "load", load_tensors_only)


def load_tensors_only(self: Any, path: str, map_location: Any = None) -> Any:
    """`TorchCheckpointEngine.load` that builds tensors, plain values, and what DeepSpeed itself keeps beside them.

    Raises ValueError that names the file and what else is in it.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"holds {found[1]}, which is no tensor and could run code" if found else "cannot be read as tensors"
            raise ValueError(f"{path}: {what}: continue from another checkpoint, or begin anew") from error


def all_gather_whole_layers(model: nn.Module, zero: dict[str, Any]) -> None:
    """ZeRO-3: one all-gather for each decoder layer and for a frozen vision tower, with the next layer prefetched.

    By default DeepSpeed all-gathers each linear layer and each adapter by a call of its own. Its hooks take longer than
    the products between them, and LoRA trains at a quarter of DDP's speed. Changes `model` and `zero`, the section
    `zero_optimization` of DeepSpeed's configuration, in place.
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
    # Parameters below the threshold stay on every GPU, and are all-gathered one by one after each step.
    zero["stage3_param_persistence_threshold"] = 0


def require_input_grad(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Forward pre-hook of the first decoder layer: its input requires a gradient.

    DeepSpeed reduces a layer's gradients when the gradient of its input arrives. (transformers'
    `enable_input_require_grads` would compute one through the whole vision tower too.)
    """
    hidden_states, *others = args
    if torch.is_grad_enabled() and not hidden_states.requires_grad:
        hidden_states = hidden_states.detach().requires_grad_()
    return hidden_states, *others


def shorten_optimizer_step(engine: Any) -> None:
    """ZeRO-1 and 2, once training has begun: the end of a step waits for nothing and launches few kernels.

    - The 16-bit parameters stay views of their flat tensor. DeepSpeed makes all views anew after each step, "just to be
      safe" as its source says.
    - The gradient norm stays on the GPU. DeepSpeed computes it in fp64, one parameter after the other, and compares it
      with a constant from the host, which waits for the whole step. In fp16, where the loss scale follows from that
      norm, and with the optimizer on the CPU, DeepSpeed's norm stays.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    upstream.replace(optimizer, "_update_model_bit16_weights", lambda group_index: None)
    if optimizer.dtype != torch.float16 and not optimizer.cpu_offload:
        upstream.replace(optimizer, "scaled_global_norm", partial(sharded_grad_norm, optimizer))


def sharded_grad_norm(optimizer: Any) -> torch.Tensor:
    """L2 norm (fp32 scalar on the GPU) of the averaged gradients, of which each process holds a shard."""
    shards = [shard for group in optimizer.averaged_gradients.values() for shard in group]
    total = torch.stack(torch._foreach_norm(shards, 2, torch.float32)).square().sum()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()
