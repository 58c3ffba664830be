"""Sharding of frozen decoder layers with an all-gather that is prefetched: for ZeRO-3 and FSDP2, dense and 4-bit weights.

DeepSpeed and PyTorch fetch, copy and release each parameter separately, because it may be trained: 1,500 of them a
step for a 7B model with adapters, and the Python of it takes longer than the GPU computes. Frozen weights need none of
that. Here the frozen weights of a decoder layer are one flat tensor. One all-gather per layer fills one of two buffers
while the layer before it is computed, in the forward and in the backward pass.
"""

import gc
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetuning import upstream
from finetuning.distributed.peer_memory import open_peers
from finetuning.kernels.frozen_weights import FourBitWeights, FrozenWeights
from finetuning.kernels.lora_layers import FusedDecoderLayer, projection_stacks
from finetuning.kernels.lora_projections import ProjectionStack, refresh_before_forward
from finetuning.models.parts import base_model_of

ALIGNMENT = 128  # bytes: where products read fast


def can_shard_layers(layers: list[nn.Module]) -> bool:
    """Whether a layer's backward pass works from a buffer that was overwritten in between.

    The fused computation reads the weights anew; PyTorch's own linear layers save them for the backward pass.
    """
    return all(isinstance(layer, FusedDecoderLayer) for layer in layers)


def shard_layers(
    model: nn.Module,
    layers: list[FusedDecoderLayer],
    device: torch.device,
    *,
    from_first: bool,
) -> None:
    """Shard the frozen weights of `layers` over all processes, and all-gather them at use; changes `model` in place.

    Afterwards the weights are plain attributes of their modules, on `device`: no library shards, moves or saves them.
    `from_first`: only the first process is sure to have loaded them, and sends them, layer by layer. What DeepSpeed
    sharded while it loaded the model, vision tower and embeddings too, is replicated: a tower's small layers would each be
    waited for.
    """
    weights = [weight for layer in layers for weight in frozen_weights(layer)]
    base_model_of(model).num_sharded = sum(count_numbers(weight) for weight in weights)
    FrozenLayerShards(layers, device, from_first=from_first)
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
    """This process's shard of each layer, and two buffers: one for even layers, one for odd layers. All are bytes.

    The weights of a layer are views of its buffer. The all-gather of the next layer starts when the GPU has finished
    the layer before the current one, which is the last to read what is overwritten. It runs beside the current layer.
    A backward pass leaves the first two layers, with which the next forward pass begins.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, *, from_first: bool):
        """`layers` in the order in which they are computed."""
        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        pieces = [pieces_of(layer) for layer in layers]
        lengths = [-(-sum(piece.length for piece in own) // (self.processes * ALIGNMENT)) * ALIGNMENT for own in pieces]
        self.buffers = [torch.zeros(self.processes * max(lengths), dtype=torch.uint8, device=device) for _ in range(2)]
        shards = self.buffers[0].new_empty(sum(lengths))
        self.shards = shards.split(lengths)
        self.layer_in_buffer: list[int | None] = [None, None]  # all-gathered, or being so
        self.pending: list[dist.Work | torch.cuda.Event | None] = [None, None]
        for index, (layer, own) in enumerate(zip(layers, pieces, strict=True)):
            full = self.buffers[index % 2][: self.processes * lengths[index]]
            self.fill(full, layer, own, from_first)
            self.shards[index].copy_(full.chunk(self.processes)[self.rank])
            view_in_buffer(full, layer, own)
            layer.register_forward_pre_hook(partial(self.before_forward, index))
            layer.register_forward_hook(partial(self.after_forward, index))
        self.peers = open_peers(shards, lengths)

    def fill(self, full: Tensor, layer: nn.Module, pieces: list["Piece"], from_first: bool) -> None:
        """Write the layer's weights into `full`, which is all zeros where they leave room."""
        full.zero_()
        with all_gathered(frozen_weights(layer)):
            if not from_first or self.rank == 0:
                for piece in pieces:
                    piece.write_into(full)
        if from_first:
            dist.broadcast(full, 0)

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
            if self.peers is not None:
                self.pending[buffer] = self.peers.start(full, index)
            else:
                self.pending[buffer] = dist.all_gather_into_tensor(full, shard, async_op=True)
            self.layer_in_buffer[buffer] = index

    def wait_for_buffer(self, buffer: int) -> None:
        """Wait until nothing that fills `buffer` (0 or 1) is pending."""
        if self.pending[buffer] is not None:
            self.pending[buffer].wait()  # on a GPU the stream waits, not the host
            self.pending[buffer] = None


class Piece:
    """Weights of a layer that lie in one block of its buffer: those of a projection stack, or one other weight.

    Args:
        stack: whose rows the block is: [W B; s A _], room for B and A included; packed W alone in 4 bits.
        weights: of the stack in order, or the one other.
        start: bytes from the begin of the buffer.
    """

    def __init__(self, stack: ProjectionStack | None, weights: list[nn.Parameter], start: int):
        self.stack, self.weights, self.start, self.dtype = stack, weights, start, weights[0].dtype
        self.sizes = [full_shape(weight)[0] for weight in weights]
        rest = list(full_shape(weights[0])[1:])
        self.shape = (sum(self.sizes), *rest)
        self.width = rest[0] if rest else None
        if stack is not None and not is_packed(stack):
            self.shape = (sum(self.sizes) + sum(stack.ranks), stack.row_length(stack.in_features))
        self.length = -(-prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def block(self, buffer: Tensor) -> Tensor:
        """The block in `buffer`, of the weights' dtype."""
        end = self.start + prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : end].view(self.dtype).view(self.shape)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Each weight in `buffer`, in its own shape."""
        block = self.block(buffer)
        return [block] if self.stack is None else list(block[: sum(self.sizes), : self.width].split(self.sizes))

    def write_into(self, buffer: Tensor) -> None:
        """Copy the weights into the block."""
        for view, weight in zip(self.views(buffer), self.weights, strict=True):
            view.copy_(weight.detach())


class BufferedWeights(FrozenWeights):
    """A stack's weights as rows of a buffer, with columns for B behind them and rows for s A below."""

    def __init__(self, stack: ProjectionStack, block: Tensor):
        """`block` (sum of out + sum of ranks, row length) of the buffer belongs to `stack` from now on."""
        super().__init__(stack.layers)
        self.joined = block[:, : stack.in_features + sum(stack.ranks)]
        self.stack = block[: sum(stack.sizes), : stack.in_features]

    def write_into(self, rows: Tensor) -> None:
        """One copy of the rows in the buffer."""
        rows.copy_(self.stack)

    def weight(self, stack: ProjectionStack) -> Tensor:
        """The rows in the buffer, where they have the dtype of the products."""
        return self.stack.to(stack.dtype)

    def weight_and_b(self, stack: ProjectionStack) -> Tensor:
        """The rows in the buffer with B written behind them, where dtypes are equal."""
        if self.joined.dtype != stack.dtype:
            return super().weight_and_b(stack)
        rows = self.joined[: len(self.stack)]
        stack.write_b(rows[:, stack.in_features :])
        return rows

    def weight_and_a(self, stack: ProjectionStack) -> Tensor:
        """The rows in the buffer with s A written below them, where dtypes are equal."""
        if self.joined.dtype != stack.dtype:
            return super().weight_and_a(stack)
        rows = self.joined[:, : stack.in_features]
        rows[len(self.stack) :] = stack.a
        return rows


class BufferedFourBitWeights(FourBitWeights):
    """A stack's packed values in a buffer. Scales of blocks, an eighth of them, stay whole in every process."""

    def __init__(self, stack: ProjectionStack, block: Tensor):
        super().__init__(stack.layers)
        super().refresh(stack)  # joins the scales, and packed values for the last time
        self.stack = block

    def refresh(self, stack: ProjectionStack) -> None:
        """Nobody moves or replaces what is no parameter."""


def is_packed(stack: ProjectionStack) -> bool:
    """Whether the stack's weights are 4-bit ones."""
    return hasattr(stack.frozen.bases[0].weight, "quant_state")


def full_shape(weight: Tensor) -> torch.Size:
    """Its shape; ZeRO-3 leaves an empty tensor in place of a sharded weight, and its full shape in `ds_shape`."""
    return getattr(weight, "ds_shape", weight.shape)


def frozen_weights(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that are not trained."""
    return [weight for weight in layer.parameters() if not weight.requires_grad]


def pieces_of(layer: nn.Module) -> list[Piece]:
    """How the layer's frozen weights lie in a buffer: those of its stacks, then the others (norms)."""
    pieces: list[Piece] = []
    stacks = projection_stacks(layer) if isinstance(layer, FusedDecoderLayer) else []
    of_stacks = [(stack, [base.weight for base in stack.frozen.bases]) for stack in stacks]
    stacked = {id(weight) for _, weights in of_stacks for weight in weights}
    others = [(None, [weight]) for weight in frozen_weights(layer) if id(weight) not in stacked]
    for stack, weights in of_stacks + others:
        pieces.append(Piece(stack, weights, pieces[-1].start + pieces[-1].length if pieces else 0))
    return pieces


def view_in_buffer(buffer: Tensor, layer: nn.Module, pieces: list[Piece]) -> None:
    """Let the layer's frozen weights be views of `buffer`, as plain attributes in place of parameters."""
    views = {}
    for piece in pieces:
        for weight, view in zip(piece.weights, piece.views(buffer), strict=True):
            views[id(weight)] = view
            if (state := getattr(weight, "quant_state", None)) is not None:
                upstream.set_read(view, "bitsandbytes.nn.modules", "quant_state", state)
        if piece.stack is not None:
            kind = BufferedFourBitWeights if is_packed(piece.stack) else BufferedWeights
            piece.stack.frozen = kind(piece.stack, piece.block(buffer))
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in views:
                del module._parameters[name]
                setattr(module, name, views[id(parameter)])


def count_numbers(weight: Tensor) -> int:
    """Of a weight, in full: of a shard that DeepSpeed holds, and of packed 4-bit values."""
    state = getattr(weight, "quant_state", None)
    return (full_shape(weight) if state is None else state.shape).numel()


def num_sharded(model: nn.Module) -> int:
    """How many numbers of `model` are sharded, and no parameters any more."""
    return getattr(base_model_of(model), "num_sharded", 0)


def all_gathered(weights: list[nn.Parameter]) -> AbstractContextManager:
    """A context in which weights that DeepSpeed sharded while it loaded them are complete."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)
