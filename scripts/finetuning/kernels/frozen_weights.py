"""The frozen base weights of linear layers that read the same activation, as one matrix W, by how they are stored.

    DenseWeights             one tensor with room for LoRA: B lies behind W and s A below it, so a use copies nothing
    Int8Weights              INT8 values and scales of rows (`int8_base.py`), multiplied as they are
    FourBitWeights           one packed tensor (NF4, FP4), dequantized in one call at each use
    ShardedWeights           of ZeRO-3 or FSDP2: there while their decoder layer is all-gathered, copied at each use
    ShardedFourBitWeights    the same in 4 bits, dequantized at each use

`distributed.sharded_layers` adds two whose weights are all-gathered into a buffer, dense and in 4 bits.
"""

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from finetuning import upstream
from finetuning.kernels.int8 import dequantize_rows, int8_linear, quantize_rows_to_int8
from finetuning.kernels.int8_base import Int8Linear
from finetuning.kernels.nf4 import dequantize_4bit

if TYPE_CHECKING:
    from finetuning.kernels.lora_projections import ProjectionStack

try:
    from bitsandbytes.functional import QuantState, dequantize_blockwise
except ImportError:
    QuantState = dequantize_blockwise = None


class FrozenWeights:
    """W (sum of out, in) of `layers` (PEFT's). A kind says how to write W into rows, and what it keeps between steps.

    `stack` is the ProjectionStack that the weights belong to: it knows ranks, adapters and the dtype of the products.
    """

    is_sharded = False
    # Whether W can be had with the low-rank weights as one matrix: [W, B] for the forward product, and [W; s A], so that
    # the gradient of x is one product. Else `product` reads both parts where they are.
    joins_adapters = True

    def __init__(self, layers: list[nn.Module]):
        self.bases = [layer.get_base_layer() for layer in layers]

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in; of 4-bit weights the type that they are dequantized to."""
        return self.bases[0].weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights, which is also that of the products."""
        return self.bases[0].weight.device

    def reset(self) -> None:
        """Forget what was laid out for another dtype or device."""

    def refresh(self, stack: "ProjectionStack") -> None:
        """Before a forward pass: follow weights that somebody moved or replaced since the last one."""

    def write_into(self, rows: Tensor) -> None:
        """Write W into `rows` (sum of out, in), of stride (any, 1)."""
        raise NotImplementedError

    def keep_a(self, a: Tensor) -> None:
        """Take over the new `a` = s A (sum of ranks, in) of this step, if [W; s A] is kept."""

    def product(self, stack: "ProjectionStack", x: Tensor, x_a: Tensor | None, out: Tensor | None = None) -> Tensor:
        """[x, x_a] [W, B]^T (tokens, sum of out), of weights that do not join the adapters."""
        raise NotImplementedError

    def weight(self, stack: "ProjectionStack") -> Tensor:
        """W (sum of out, in) in the dtype of the products."""
        weight = stack.a.new_empty(sum(stack.sizes), stack.in_features)
        self.write_into(weight)
        return weight

    def weight_and_b(self, stack: "ProjectionStack") -> Tensor:
        """[W, B] (sum of out, in + sum of ranks), for the forward product."""
        joined = stack.allocate_rows(sum(stack.sizes), stack.in_features)
        weight, b = joined.split([stack.in_features, sum(stack.ranks)], 1)
        self.write_into(weight)
        stack.write_b(b)
        return joined

    def weight_and_a(self, stack: "ProjectionStack") -> Tensor:
        """[W; s A] (sum of out + sum of ranks, in), for the gradient of x."""
        joined = stack.a.new_empty(sum(stack.sizes) + sum(stack.ranks), stack.in_features)
        weight, a = joined.split([sum(stack.sizes), sum(stack.ranks)])
        self.write_into(weight)
        a.copy_(stack.a)
        return joined


class DenseWeights(FrozenWeights):
    """Weights that are stacked in memory once; the layers' own weights become views of the stack."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.reset()

    def reset(self) -> None:
        """Drop the stack: the next `refresh` makes one."""
        self.joined: Tensor | None = None  # (sum of out + sum of ranks, in + sum of ranks)
        self.views: list[Tensor] = []

    def refresh(self, stack: "ProjectionStack") -> None:
        """Stack the weights at first use, and again when one is no longer a view of the stack."""
        weights = [base.weight for base in self.bases]
        if self.views and all(map(Tensor.is_set_to, weights, self.views)):
            return
        if stack.dtype == self.dtype:
            rows = sum(stack.sizes)
            self.joined = stack.allocate_rows(rows + sum(stack.ranks), stack.in_features)
            self.stack, b = self.joined[:rows].split([stack.in_features, sum(stack.ranks)], 1)
            torch.cat([weight.data for weight in weights], out=self.stack)
            stack.bind_b(b.zero_())
        else:
            self.stack = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        # Each view gets a storage of its own: transformers, saving a merged model, cannot compare strided rows of a
        # shared one.
        self.views = [from_dlpack(rows) for rows in self.stack.split(stack.sizes)]
        for weight, rows in zip(weights, self.views, strict=True):
            upstream.replace(weight, "data", rows)

    def write_into(self, rows: Tensor) -> None:
        """One copy of the stack."""
        rows.copy_(self.stack)

    def keep_a(self, a: Tensor) -> None:
        """Copy s A below W, where [W; s A] is kept: the weights have the dtype of the products."""
        if self.joined is not None:
            self.joined[len(self.stack) :, : a.shape[1]] = a

    def weight(self, stack: "ProjectionStack") -> Tensor:
        """The stack itself, where it has the dtype of the products."""
        return self.stack.to(stack.dtype)

    def weight_and_b(self, stack: "ProjectionStack") -> Tensor:
        """A view, where weights and products have one dtype."""
        return super().weight_and_b(stack) if self.joined is None else self.joined[: len(self.stack)]

    def weight_and_a(self, stack: "ProjectionStack") -> Tensor:
        """A view, where weights and products have one dtype."""
        return super().weight_and_a(stack) if self.joined is None else self.joined[:, : stack.in_features]


class Int8Weights(FrozenWeights):
    """INT8 weights and scales of rows, stacked; the layers' own become views."""

    joins_adapters = False

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.reset()

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and outputs."""
        return self.bases[0].dtype

    def reset(self) -> None:
        """Drop the stack: the next `refresh` makes one."""
        self.stack: Tensor | None = None

    def refresh(self, stack: "ProjectionStack") -> None:
        """Stack the weights at first use."""
        if self.stack is None:
            weights = [base.weight for base in self.bases]
            self.stack = concatenate_and_rebind([weight.data for weight in weights], weights, "data", self.device)
            self.scale = torch.cat([base.scale for base in self.bases])
            spans = torch.empty(sum(stack.sizes), 2, dtype=torch.int32)
            for rows, columns in stack.b_blocks:
                spans[rows] = torch.tensor([columns.start, columns.stop], dtype=torch.int32)
            self.spans = spans.to(self.device)

    def write_into(self, rows: Tensor) -> None:
        """One dequantization of the stack."""
        rows.copy_(dequantize_rows(self.stack, self.scale, rows.dtype))

    def product(self, stack: "ProjectionStack", x: Tensor, x_a: Tensor | None, out: Tensor | None = None) -> Tensor:
        """[x, x_a] [W, B]^T (tokens, sum of out), added to `out` where it is given; x W^T without `x_a`."""
        adds = out is not None
        out = x.new_empty(len(x), sum(stack.sizes)) if out is None else out
        low_rank = () if x_a is None else ((x_a, stack.b.T), self.spans)
        return int8_linear(quantize_rows_to_int8(x), (self.stack, self.scale), out, *low_rank, adds=adds)


class FourBitWeights(FrozenWeights):
    """bitsandbytes' weights, stacked as they are: packed values and block scales become views of the stack's."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.states = [base.weight.quant_state for base in self.bases]
        self.stacked: list[QuantState] = []

    @property
    def dtype(self) -> torch.dtype:
        """The type that bitsandbytes dequantizes to."""
        return self.states[0].dtype

    def refresh(self, stack: "ProjectionStack") -> None:
        """Stack the weights at first use, and again when one was moved, or quantized anew (PEFT does so when it unmerges)."""
        weights = [base.weight for base in self.bases]
        states = [weight.quant_state for weight in weights]
        unmoved = self.stacked and weights[0].data_ptr() == self.stack.data_ptr()
        if unmoved and all(map(operator.is_, states, self.stacked)):
            return
        self.concatenate(self.device)

    def concatenate(self, device: torch.device | str) -> None:
        """Make the stack, on `device`; the layers' weights become its views."""
        weights = [base.weight for base in self.bases]
        self.stacked = self.states = states = [weight.quant_state for weight in weights]
        first, self.lengths = states[0], [len(state.absmax) for state in states]
        # Doubly quantized scales stay so where each weight has whole blocks of them, as at every real size.
        if first.nested and any(length % first.state2.blocksize for length in self.lengths[:-1]):
            for state in states:
                upstream.replace(state, "absmax", block_scales(state))
                upstream.replace(state, "nested", False)
        of_scales = [state.state2 for state in states] if first.nested else []
        self.stack = concatenate_and_rebind([weight.data for weight in weights], weights, "data", device)
        self.absmax = concatenate_and_rebind([state.absmax for state in states], states, "absmax", device)
        if of_scales:
            self.state_of_scales = QuantState(
                concatenate_and_rebind([state.absmax for state in of_scales], of_scales, "absmax", device),
                code=of_scales[0].code,
                blocksize=of_scales[0].blocksize,
                dtype=of_scales[0].dtype,
            )

    def all_block_scales(self) -> Tensor:
        """fp32 scales of all blocks of the stack, 1-D."""
        if not self.stacked[0].nested:
            return self.absmax
        absmax = dequantize_blockwise(self.absmax, self.state_of_scales)
        torch._foreach_add_(list(absmax.split(self.lengths)), [state.offset for state in self.stacked])
        return absmax

    def write_into(self, rows: Tensor) -> None:
        """One dequantization of the stack."""
        state = self.states[0]
        dequantize_4bit(self.stack, self.all_block_scales(), state.code, state.blocksize, rows)


class ShardedWeights(FrozenWeights):
    """Weights that ZeRO-3 or FSDP2 all-gathers for one decoder layer at a time."""

    is_sharded = True

    def write_into(self, rows: Tensor) -> None:
        """One copy for each layer, whose weights are all-gathered now."""
        for part, base in zip(rows.split([base.out_features for base in self.bases]), self.bases, strict=True):
            part.copy_(base.weight.detach())


class ShardedFourBitWeights(ShardedWeights):
    """The same in 4 bits. FSDP2 turns them into plain parameters, so their quantization states are kept here."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.states = [base.weight.quant_state for base in self.bases]

    @property
    def dtype(self) -> torch.dtype:
        """The type that bitsandbytes dequantizes to."""
        return self.states[0].dtype

    def write_into(self, rows: Tensor) -> None:
        """One dequantization for each layer, whose weights are all-gathered now."""
        parts = rows.split([base.out_features for base in self.bases])
        for part, base, state in zip(parts, self.bases, self.states, strict=True):
            dequantize_4bit(base.weight.detach(), block_scales(state), state.code, state.blocksize, part)


def frozen_weights_of(layers: list[nn.Module], *, sharded: bool) -> FrozenWeights:
    """The kind that the weights of `layers` are; `sharded`: a strategy all-gathers them layer by layer."""
    if isinstance(layers[0].get_base_layer(), Int8Linear):
        return Int8Weights(layers)
    if hasattr(layers[0].get_base_layer().weight, "quant_state"):
        return (ShardedFourBitWeights if sharded else FourBitWeights)(layers)
    return (ShardedWeights if sharded else DenseWeights)(layers)


def block_scales(state: "QuantState") -> Tensor:
    """fp32 scales of the blocks of one 4-bit weight, 1-D."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def stack_by_way_of_main_memory(kinds: list[FourBitWeights]) -> None:
    """Stack 4-bit weights before the first pass, all of them by way of main memory.

    Concatenated on the GPU one after another they leave holes, because PyTorch's allocator gives back whole segments only:
    1.1 GiB with LLaVA-1.5-7B (its allocations replayed on a CPU), a sixth of an 8 GB card.
    """
    devices = [weights.device for weights in kinds]
    for weights in kinds:
        weights.concatenate("cpu")
    torch.cuda.empty_cache()
    for weights, device in zip(kinds, devices, strict=True):
        weights.concatenate(device)


def concatenate_and_rebind(parts: list[Tensor], owners: list, name: str, device: torch.device | str) -> Tensor:
    """Concatenate `parts` along dim 0, on `device`; attribute `name` of each owner becomes its view: no memory is added."""
    full = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device)
    for owner, part in zip(owners, full.split([len(part) for part in parts]), strict=True):
        upstream.replace(owner, name, part)
    return full
