"""Frozen decoder layers of which each process keeps a share: ZeRO-3 for the weights that LoRA does not train.

DeepSpeed's ZeRO-3 fetches, copies and releases each parameter by itself, because it may be trained: for a 7B model with
adapters 1,500 of them a step, by Python that takes longer than the GPU computes. What is frozen needs none of it. Here the
frozen weights of a layer are one flat tensor, and one message puts it together, in one of two buffers, while the layer
before is computed: forwards and then backwards.
"""

import gc
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetuning import upstream
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack, refresh_before_forward
from finetuning.models.parts import base_model_of


def can_shard_layers(layers: list[nn.Module]) -> bool:
    """Whether nothing keeps a layer's weights for its backward pass, when the buffer holds another layer's already.

    The fused computation reads them anew; PyTorch's own linear layers keep them.
    """
    frozen = {(weight.dtype, weight.device) for layer in layers for weight in frozen_weights(layer)}
    return len(frozen) == 1 and all(isinstance(layer, FusedDecoderLayer) for layer in layers)


def shard_layers(model: nn.Module, layers: list[FusedDecoderLayer]) -> None:
    """Divide the frozen weights of `layers`, and let them be gathered when they are needed; changes `model` in place.

    Whatever else DeepSpeed divided when it was loaded is whole afterwards, on every process: a vision tower, embeddings.
    """
    FrozenLayerShards(layers)
    whole = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "ds_id"):
                if parameter not in whole:
                    with all_gathered([parameter]):
                        weight = parameter.detach().clone()
                    whole[parameter] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                module._parameters[name] = whole[parameter]
    stacks = [stack for layer in layers for stack in projection_stacks(layer)]
    base_model_of(model).register_forward_pre_hook(partial(refresh_before_forward, stacks), with_kwargs=True)
    gc.collect()  # DeepSpeed's parameters hold functions that hold them


class FrozenLayerShards:
    """Two buffers and the layers that take turns in them, each always in the same one: its weights are views of it.

    A gather begins when all work so far on the GPU is done, which is also when nobody reads what it overwrites: the layer
    before the one that begins. It runs beside that one.
    """

    def __init__(self, layers: list[FusedDecoderLayer]):
        self.processes = dist.get_world_size()
        self.shards = [self.own_shard(layer) for layer in layers]
        size = self.processes * max(map(len, self.shards))
        self.buffers = [self.shards[0].new_empty(size) for _ in range(2)]
        self.layer_in_buffer: list[int | None] = [None, None]  # the layer in each buffer, there or on its way
        self.pending: list[dist.Work | None] = [None, None]
        for index, layer in enumerate(layers):
            view_in_buffer(self.buffers[index % 2], layer)
            layer.register_forward_pre_hook(partial(self.before_forward, index))
            layer.register_forward_hook(partial(self.after_forward, index))

    def own_shard(self, layer: FusedDecoderLayer) -> Tensor:
        with all_gathered(frozen_weights(layer)):
            parts = []
            for stack in projection_stacks(layer):
                rows = torch.cat([base.weight.detach() for base in stack.bases])
                parts.append(F.pad(rows, (0, stack.row_length(stack.in_features) - stack.in_features)).flatten())
            flat = torch.cat([*parts, *(weight.detach().flatten() for weight in unstacked_frozen_weights(layer))])
        shard = -(-len(flat) // self.processes)
        start = dist.get_rank() * shard
        return F.pad(flat, (0, shard * self.processes - len(flat)))[start : start + shard].clone()

    def before_forward(self, index: int, layer: nn.Module, args: tuple) -> None:
        # A layer that checkpointing computes again runs within the backward pass.
        self.gather_with_next(index, 1 if torch._C._current_graph_task_id() == -1 else -1)

    def after_forward(self, index: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: self.gather_with_next(index, -1))

    def gather_with_next(self, index: int, step: int) -> None:
        """Have layer `index` there, and the one after it (`step` 1) or before it (-1) on its way."""
        self.start_all_gather(index)
        self.wait_for_buffer(index % 2)
        if 0 <= index + step < len(self.shards):
            self.start_all_gather(index + step)

    def start_all_gather(self, index: int) -> None:
        slot, shard = index % 2, self.shards[index]
        if self.layer_in_buffer[slot] != index:
            self.wait_for_buffer(slot)
            whole = self.buffers[slot][: self.processes * len(shard)]
            self.pending[slot] = dist.all_gather_into_tensor(whole, shard, async_op=True)
            self.layer_in_buffer[slot] = index

    def wait_for_buffer(self, slot: int) -> None:
        if self.pending[slot] is not None:
            self.pending[slot].wait()  # on a GPU the stream waits, not the host
            self.pending[slot] = None


class GatheredProjections(ProjectionStack):
    """A stack that lies in a buffer while its layer is there, with columns for B behind it."""

    def lie_in(self, rows: Tensor) -> None:
        """`rows` (sum of out, row length) of the buffer are the stack's from now on; there is none for A below."""
        self.rows = rows[:, : self.in_features + sum(self.ranks)]
        self.stack = rows[:, : self.in_features]
        self.is_sharded = self.gradient_in_one = False

    def stack_weights(self, weights: list[nn.Parameter], *, joins: bool) -> None:
        """Nothing: they are a stack already."""

    def weight_and_b(self) -> Tensor:
        if self.rows.dtype != self.dtype:
            return super().weight_and_b()
        self.rows[:, self.in_features :] = self.b
        return self.rows


def frozen_weights(layer: nn.Module) -> list[nn.Parameter]:
    """All that is not trained."""
    return [weight for weight in layer.parameters() if not weight.requires_grad]


def unstacked_frozen_weights(layer: FusedDecoderLayer) -> list[nn.Parameter]:
    """Those that are part of no stack."""
    stacked = {id(base.weight) for stack in projection_stacks(layer) for base in stack.bases}
    return [weight for weight in frozen_weights(layer) if id(weight) not in stacked]


def view_in_buffer(buffer: Tensor, layer: FusedDecoderLayer) -> None:
    """Replace the layer's frozen parameters by views of `buffer`: the stacks' rows, then the others."""
    views, start = {}, 0
    for stack in projection_stacks(layer):
        size = sum(stack.sizes) * stack.row_length(stack.in_features)
        stack.__class__ = GatheredProjections
        stack.lie_in(buffer[start : start + size].view(-1, stack.row_length(stack.in_features)))
        start += size
        views |= zip((base.weight for base in stack.bases), stack.stack.split(stack.sizes), strict=True)
    for weight in unstacked_frozen_weights(layer):
        shape = getattr(weight, "ds_shape", weight.shape)
        views[weight] = buffer[start : start + shape.numel()].view(shape)
        start += shape.numel()
    parameters = {weight: nn.Parameter(view, requires_grad=False) for weight, view in views.items()}
    upstream.check_read("deepspeed.runtime.engine", "ds_optim_param")
    for parameter in parameters.values():
        # DeepSpeed's mark of weights that it neither divides nor sends to the others when training begins: the buffer
        # holds nothing then, and NCCL sends no tensors with room between their rows.
        parameter.ds_optim_param = True
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter in parameters:
                module._parameters[name] = parameters[parameter]


def all_gathered(weights: list[nn.Parameter]):
    """Inside, weights that DeepSpeed divided when it loaded them are whole."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)
