"""Sharding of frozen decoder layers with an all-gather that is prefetched: ZeRO-3 for weights that LoRA does not train.

DeepSpeed's ZeRO-3 fetches, copies and releases each parameter separately, because it may be trained: 1,500 of them a
step for a 7B model with adapters, and the Python of it takes longer than the GPU computes. Frozen weights need none of
that. Here the frozen weights of a decoder layer are one flat tensor. One all-gather per layer fills one of two buffers
while the layer before it is computed, in the forward and in the backward pass.
"""

import gc
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetuning import upstream
from finetuning.kernels.frozen_weights import FrozenWeights
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack, refresh_before_forward
from finetuning.models.parts import base_model_of


def can_shard_layers(layers: list[nn.Module]) -> bool:
    """Whether a layer's backward pass works from a buffer that was overwritten in between, and weights have one dtype.

    The fused computation reads the weights anew; PyTorch's own linear layers save them for the backward pass.
    """
    frozen = {(weight.dtype, weight.device) for layer in layers for weight in frozen_weights(layer)}
    return len(frozen) == 1 and all(isinstance(layer, FusedDecoderLayer) for layer in layers)


def shard_layers(model: nn.Module, layers: list[FusedDecoderLayer]) -> None:
    """Shard the frozen weights of `layers` over all processes, and all-gather them at use; changes `model` in place.

    All else that DeepSpeed sharded while it loaded the model (vision tower, embeddings) is replicated afterwards.
    """
    FrozenLayerShards(layers)
    full = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "ds_id"):
                if parameter not in full:
                    with all_gathered([parameter]):
                        weight = parameter.detach().clone()
                    full[parameter] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
                module._parameters[name] = full[parameter]
    stacks = [stack for layer in layers for stack in projection_stacks(layer)]
    base_model_of(model).register_forward_pre_hook(partial(refresh_before_forward, stacks), with_kwargs=True)
    gc.collect()  # DeepSpeed's parameters hold functions that hold them


class FrozenLayerShards:
    """This process's shard of each layer, and two buffers: one for even layers, one for odd layers.

    The parameters of a layer are views of its buffer. The all-gather of the next layer starts when the GPU has finished
    the layer before the current one, which is the last to read what is overwritten. It runs beside the current layer.
    """

    def __init__(self, layers: list[FusedDecoderLayer]):
        self.processes = dist.get_world_size()
        self.shards = [self.own_shard(layer) for layer in layers]
        size = self.processes * max(map(len, self.shards))
        self.buffers = [self.shards[0].new_empty(size) for _ in range(2)]
        self.layer_in_buffer: list[int | None] = [None, None]  # all-gathered, or being so
        self.pending: list[dist.Work | None] = [None, None]
        for index, layer in enumerate(layers):
            view_in_buffer(self.buffers[index % 2], layer)
            layer.register_forward_pre_hook(partial(self.before_forward, index))
            layer.register_forward_hook(partial(self.after_forward, index))

    def own_shard(self, layer: FusedDecoderLayer) -> Tensor:
        """This process's part of the layer's frozen weights, 1-D, padded so that all parts are as long."""
        with all_gathered(frozen_weights(layer)):
            parts = []
            for stack in projection_stacks(layer):
                rows = torch.cat([base.weight.detach() for base in stack.frozen.bases])
                parts.append(F.pad(rows, (0, stack.row_length(stack.in_features) - stack.in_features)).flatten())
            flat = torch.cat([*parts, *(weight.detach().flatten() for weight in unstacked_frozen_weights(layer))])
        length = -(-len(flat) // self.processes)
        start = dist.get_rank() * length
        return F.pad(flat, (0, length * self.processes - len(flat)))[start : start + length].clone()

    def before_forward(self, index: int, layer: nn.Module, args: tuple) -> None:
        """Forward pre-hook of layer `index`."""
        # A forward pass inside the backward pass is activation checkpointing: layers come in descending order.
        self.gather_and_prefetch(index, 1 if torch._C._current_graph_task_id() == -1 else -1)

    def after_forward(self, index: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of layer `index`: its gradient's arrival begins the layer's backward pass."""
        if output.requires_grad:
            output.register_hook(lambda grad: self.gather_and_prefetch(index, -1))

    def gather_and_prefetch(self, index: int, step: int) -> None:
        """Have layer `index` in its buffer; start the all-gather of the next (`step` 1) or the previous one (-1)."""
        self.start_all_gather(index)
        self.wait_for_buffer(index % 2)
        if 0 <= index + step < len(self.shards):
            self.start_all_gather(index + step)

    def start_all_gather(self, index: int) -> None:
        """Start filling the buffer of layer `index`, unless it holds the layer already."""
        buffer, shard = index % 2, self.shards[index]
        if self.layer_in_buffer[buffer] != index:
            self.wait_for_buffer(buffer)
            full = self.buffers[buffer][: self.processes * len(shard)]
            self.pending[buffer] = dist.all_gather_into_tensor(full, shard, async_op=True)
            self.layer_in_buffer[buffer] = index

    def wait_for_buffer(self, buffer: int) -> None:
        """Wait until no all-gather into `buffer` (0 or 1) is pending."""
        if self.pending[buffer] is not None:
            self.pending[buffer].wait()  # on a GPU the stream waits, not the host
            self.pending[buffer] = None


class BufferedWeights(FrozenWeights):
    """A stack's weights as rows of a buffer, with columns for B behind them and no rows for s A below."""

    joins_a = False

    def __init__(self, stack: ProjectionStack, rows: Tensor):
        """`rows` (sum of out, row length) of the buffer belong to `stack` from now on."""
        super().__init__(stack.layers)
        self.rows = rows[:, : stack.in_features + sum(stack.ranks)]
        self.stack = rows[:, : stack.in_features]

    def write_into(self, rows: Tensor) -> None:
        """One copy of the rows in the buffer."""
        rows.copy_(self.stack)

    def weight(self, stack: ProjectionStack) -> Tensor:
        """The rows in the buffer, where they have the dtype of the products."""
        return self.stack.to(stack.dtype)

    def weight_and_b(self, stack: ProjectionStack) -> Tensor:
        """The rows in the buffer with B written behind them, where dtypes are equal."""
        if self.rows.dtype != stack.dtype:
            return super().weight_and_b(stack)
        self.rows[:, stack.in_features :] = stack.b
        return self.rows


def frozen_weights(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that are not trained."""
    return [weight for weight in layer.parameters() if not weight.requires_grad]


def unstacked_frozen_weights(layer: FusedDecoderLayer) -> list[nn.Parameter]:
    """The layer's frozen parameters outside of its projections: norms."""
    stacked = {id(base.weight) for stack in projection_stacks(layer) for base in stack.frozen.bases}
    return [weight for weight in frozen_weights(layer) if id(weight) not in stacked]


def view_in_buffer(buffer: Tensor, layer: FusedDecoderLayer) -> None:
    """Replace the layer's frozen parameters by views of `buffer`: the rows of its stacks, then the others."""
    views, start = {}, 0
    others = unstacked_frozen_weights(layer)
    for stack in projection_stacks(layer):
        size = sum(stack.sizes) * stack.row_length(stack.in_features)
        weights = [base.weight for base in stack.frozen.bases]
        stack.frozen = BufferedWeights(
            stack, buffer[start : start + size].view(-1, stack.row_length(stack.in_features))
        )
        start += size
        views |= zip(weights, stack.frozen.stack.split(stack.sizes), strict=True)
    for weight in others:
        shape = getattr(weight, "ds_shape", weight.shape)
        views[weight] = buffer[start : start + shape.numel()].view(shape)
        start += shape.numel()
    parameters = {weight: nn.Parameter(view, requires_grad=False) for weight, view in views.items()}
    for parameter in parameters.values():
        # DeepSpeed neither shards a parameter with this mark nor broadcasts it when training begins. The buffer holds
        # nothing by then, and NCCL sends no strided tensors.
        upstream.set_read(parameter, "deepspeed.runtime.engine", "ds_optim_param", True)
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter in parameters:
                module._parameters[name] = parameters[parameter]


def all_gathered(weights: list[nn.Parameter]) -> AbstractContextManager:
    """A context in which weights that DeepSpeed sharded while it loaded them are complete."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)
