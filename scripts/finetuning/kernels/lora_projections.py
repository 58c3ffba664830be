"""LoRA layers that read the same activation, as one matrix product with a frozen base: dense, 4-bit or sharded."""

import operator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from finetuning import upstream
from finetuning.kernels.dropout import hashed_dropout
from finetuning.kernels.nf4 import dequantize_4bit

try:
    from bitsandbytes.functional import QuantState, dequantize_blockwise
except ImportError:
    QuantState = dequantize_blockwise = None


class ProjectionStack:
    """LoRA layers of PEFT that read the same activation, as one product: y = [x, s A x] [W, B]^T, W = [W_1; W_2; ...].

    The gradient of x is one product too: [g, g B] [W; s A], where nothing is dropped.

    Base weights are stacked in memory once, with columns for B behind them and rows for s A below, and the layers' own
    weights become views of the stack; 4-bit ones are stacked as they are and unpacked in one call at each use, in front of
    B or above s A. Weights that ZeRO-3 or FSDP2 divides (`sharded`) come and go, and are copied there. The adapters are
    stacked as s A and as B, block-diagonal. What writes x leaves room for s A x behind each row (`allocate_input`), what writes
    g for g B (`allocate_grad`).

    One product, because then the sum is rounded to 16 bits once. PEFT adds the low-rank part to a product that is rounded
    already, where most of what is less than half a unit in its last place is lost: at a learning rate of 1.4e-5 and a
    rank of 64, 99 % of what the first step taught, 86 % after ten, 59 % after thirty. `addmm` is no way out: cuBLAS (13, on
    an H200) rounds the product before it adds (the CPU does not).

    The adapters' dropout is drawn once for all layers of the stack, because they read the same activation: elements are
    dropped as often as PEFT drops them. `refresh` must run before each forward pass of the model; where weights are
    divided, of each decoder layer.
    """

    def __init__(self, layers: list[nn.Module], *, sharded: bool = False):
        self.layers = layers
        self.bases = [layer.get_base_layer() for layer in layers]
        self.adapter = layers[0].active_adapters[0]
        self.sizes = [layer.out_features for layer in layers]
        self.in_features = layers[0].in_features
        self.ranks = [layer.r[self.adapter] for layer in layers]
        self.scales = [layer.scaling[self.adapter] for layer in layers]
        # Where each layer's B lies among all, and its gradient.
        spans = zip(accumulate(self.sizes), self.sizes, accumulate(self.ranks), self.ranks, strict=True)
        self.diagonal = [(slice(row - size, row), slice(column - rank, column)) for row, size, column, rank in spans]
        # Layers of one shape are a batch of small products; of others, one product with each B and zeros beside it.
        self.is_batch = len(layers) > 1 and len(set(self.sizes)) == len(set(self.ranks)) == 1
        self.dropout = getattr(layers[0].lora_dropout[self.adapter], "p", 0.0)
        self.is_quantized = hasattr(self.bases[0].weight, "quant_state")
        # FSDP2 makes plain parameters of 4-bit ones, which do not say how they are to be unpacked.
        self.states = [base.weight.quant_state for base in self.bases] if self.is_quantized else []
        self.is_sharded = sharded
        self.gradient_in_one = True
        self.is_active = True
        self.types: tuple | None = None

    def adapters(self) -> list[Tensor]:
        """The parameters: every A (rank, in), then every B (out, rank)."""
        first = [layer.lora_A[self.adapter].weight for layer in self.layers]
        return first + [layer.lora_B[self.adapter].weight for layer in self.layers]

    def refresh(self, autocast_dtype: torch.dtype | None) -> None:
        """Follow what changed since the last pass; `copies` are still to be filled from `parameters`.

        Products run in autocast's type where it is on, else in the type of the base weights (of 4-bit ones: what they
        unpack to).
        """
        first = self.layers[0]
        self.is_active = not first.disable_adapters and not first.merged and first.active_adapters == [self.adapter]
        self.parameters = self.adapters()
        self.drops = self.dropout > 0 and first.training
        weights = [base.weight for base in self.bases]
        own_dtype = self.states[0].dtype if self.is_quantized else weights[0].dtype
        types = (autocast_dtype or own_dtype, own_dtype, weights[0].device)
        if types != self.types:
            self.types, self.dtype = types, types[0]
            self.a = torch.empty(sum(self.ranks), self.in_features, dtype=self.dtype, device=types[2])
            self.scale = torch.cat([torch.full((rank, 1), s) for rank, s in zip(self.ranks, self.scales, strict=True)])
            self.scale = self.scale.to(types[2])
            self.joined, self.stacked = None, []
            self.bind_b(torch.zeros(sum(self.sizes), sum(self.ranks), dtype=self.dtype, device=types[2]))
        if self.is_sharded:
            return
        if self.is_quantized:
            self.stack_quantized(weights)
        else:
            self.stack_weights(weights, joins=self.dtype == own_dtype)

    def bind_b(self, b: Tensor) -> None:
        self.b = b
        self.copies = [*self.a.split(self.ranks), *(b[place] for place in self.diagonal)]
        if self.is_batch:
            layers = len(self.layers)
            blocks = b.unflatten(0, (layers, -1)).unflatten(2, (layers, -1))
            self.b_per_layer = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (layers, out, rank)

    def stack_weights(self, weights: list[nn.Parameter], *, joins: bool) -> None:
        if self.stacked and all(map(Tensor.is_set_to, weights, self.stacked)):
            return
        # First use, or somebody moved or replaced the weights.
        if joins:
            rows = sum(self.sizes)
            self.joined = self.allocate_rows(rows + sum(self.ranks), self.in_features)
            self.stack, b = self.joined[:rows].split([self.in_features, sum(self.ranks)], 1)
            torch.cat([weight.data for weight in weights], out=self.stack)
            self.bind_b(b.zero_())
        else:
            self.stack = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        # Each a storage of its own: transformers, saving a merged model, cannot compare rows that lie apart in a shared one.
        self.stacked = [from_dlpack(rows) for rows in self.stack.split(self.sizes)]
        for weight, rows in zip(weights, self.stacked, strict=True):
            upstream.replace(weight, "data", rows)

    def stack_quantized(self, weights: list[nn.Parameter]) -> None:
        states = [weight.quant_state for weight in weights]
        if self.stacked and all(map(operator.is_, states, self.stacked)):
            return
        self.stacked = self.states = states
        first, self.lengths = states[0], [len(state.absmax) for state in states]
        # Scales that are quantised too stay so where blocks of them end with a weight, as they do at every real size.
        if first.nested and any(length % first.state2.blocksize for length in self.lengths[:-1]):
            for state in states:
                upstream.replace(state, "absmax", block_scales(state))
                for name, value in {"nested": False, "state2": None, "offset": None}.items():
                    upstream.replace(state, name, value)
        of_scales = [state.state2 for state in states] if first.nested else []
        # One memory for the stack and for the weights, so that none is added.
        self.stack = concatenate_and_rebind([weight.data for weight in weights], weights, "data")
        self.absmax = concatenate_and_rebind([state.absmax for state in states], states, "absmax")
        if of_scales:
            in_one_of_scales = concatenate_and_rebind([state.absmax for state in of_scales], of_scales, "absmax")
            self.state_of_scales = QuantState(
                in_one_of_scales, code=of_scales[0].code, blocksize=of_scales[0].blocksize, dtype=of_scales[0].dtype
            )

    def scales_of_blocks(self) -> Tensor:
        """Of the whole stack; those that are quantised too are unpacked here."""
        if not self.stacked[0].nested:
            return self.absmax
        absmax = dequantize_blockwise(self.absmax, self.state_of_scales)
        torch._foreach_add_(list(absmax.split(self.lengths)), [state.offset for state in self.stacked])
        return absmax

    def row_length(self, width: int) -> int:
        """Numbers from one row to the next, of `width` and the low-rank ones: products are fast at multiples of 64."""
        return -(-(width + sum(self.ranks)) // 64) * 64

    def allocate_rows(self, rows: int, width: int) -> Tensor:
        """Memory for (rows, width + sum of ranks)."""
        # oneDNN's AMX kernels read what lies behind a row, times zero, which is NaN if that is.
        allocate = self.a.new_empty if self.a.is_cuda else self.a.new_zeros
        return allocate(rows, self.row_length(width))[:, : width + sum(self.ranks)]

    def allocate_input(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Memory for x (tokens, in), and the same with room behind its rows, (tokens, in + sum of ranks)."""
        wide = self.allocate_rows(tokens, self.in_features)
        return wide[:, : self.in_features], wide

    def concatenate_low_rank(self, first: Tensor, low_rank: Tensor) -> Tensor:
        """A copy of both, (tokens, width + sum of ranks)."""
        rows, width = first.shape
        if self.row_length(width) == width + sum(self.ranks):
            return torch.cat([first, low_rank], dim=1)  # in half the time of two copies
        wide = self.allocate_rows(rows, width)
        wide[:, :width], wide[:, width:] = first, low_rank
        return wide

    def gradient_is_one_product(self, seeds: Tensor | None) -> bool:
        """Whether the gradient of x is one product."""
        return self.gradient_in_one and seeds is None

    def allocate_grad(self, tokens: int, seeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Memory for the gradient of y (tokens, sum of out), and the same with room, where x's will be one product."""
        if not self.gradient_is_one_product(seeds):
            return self.a.new_empty(tokens, sum(self.sizes)), None
        wide = self.allocate_rows(tokens, sum(self.sizes))
        return wide[:, : sum(self.sizes)], wide

    def write_weight(self, rows: Tensor) -> None:
        """Stacked base weights into `rows` (sum of out, in), which may lie apart."""
        if self.is_sharded and self.is_quantized:
            for part, base, state in zip(rows.split(self.sizes), self.bases, self.states, strict=True):
                dequantize_4bit(base.weight.detach(), block_scales(state), state.code, state.blocksize, part)
        elif self.is_sharded:
            for part, base in zip(rows.split(self.sizes), self.bases, strict=True):
                part.copy_(base.weight.detach())
        elif self.is_quantized:
            state = self.states[0]
            dequantize_4bit(self.stack, self.scales_of_blocks(), state.code, state.blocksize, rows)
        else:
            rows.copy_(self.stack)

    def weight(self) -> Tensor:
        """Stacked base weights, (sum of out, in)."""
        if not self.is_quantized and not self.is_sharded:
            return self.stack.to(self.dtype)
        weight = self.a.new_empty(sum(self.sizes), self.in_features)
        self.write_weight(weight)
        return weight

    def weight_and_b(self) -> Tensor:
        """[W, B], (sum of out, in + sum of ranks): kept where the weights are in the products' type, else made anew."""
        if self.joined is not None:
            return self.joined[: sum(self.sizes)]
        joined = self.allocate_rows(sum(self.sizes), self.in_features)
        weight, b = joined.split([self.in_features, sum(self.ranks)], 1)
        self.write_weight(weight)
        b.copy_(self.b)
        return joined

    def weight_and_a(self) -> Tensor:
        """[W; s A], (sum of out + sum of ranks, in), likewise."""
        if self.joined is not None:
            return self.joined[:, : self.in_features]
        joined = self.a.new_empty(sum(self.sizes) + sum(self.ranks), self.in_features)
        weight, a = joined.split([sum(self.sizes), sum(self.ranks)])
        self.write_weight(weight)
        a.copy_(self.a)
        return joined

    def add_transposed_product(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """grad_x + W^T grad, in place."""
        return grad_x.addmm_(grad, self.weight())

    def draw_seeds(self) -> Tensor | None:
        # Drawn from the device's generator, which checkpointing rewinds before it computes a layer again.
        return torch.randint(2**31, (2,), device=self.a.device) if self.drops else None

    def forward(self, x: Tensor, seeds: Tensor | None, wide: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (tokens, in) -> y (tokens, sum of out), and x_a = s A x (tokens, sum of ranks).

        `wide` is what `allocate_input` gave with x; without it x is copied.
        """
        x_a = torch.mm(x if seeds is None else hashed_dropout(x, seeds, self.dropout), self.a.T)
        if wide is None:
            wide = self.concatenate_low_rank(x, x_a)
        else:
            wide[:, self.in_features :] = x_a
        return torch.mm(wide, self.weight_and_b().T), x_a

    def backward(
        self, grad: Tensor, x_a: Tensor, seeds: Tensor | None, needs_grad: bool, wide: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Gradient of x (None when nothing below is trained), of x_a, and of every B.

        `wide` is what `allocate_grad` gave with grad; without it grad is copied, where that is less than x to write twice.
        """
        grads_b = self.grads_of_b(grad, x_a)
        room = grad.new_empty(len(grad), sum(self.ranks)) if wide is None else wide[:, grad.shape[1] :]
        grad_a = self.grad_of_x_a(grad, room)
        if not needs_grad:
            return None, grad_a, grads_b
        if wide is None and grad.shape[1] < self.in_features and self.gradient_is_one_product(seeds):
            wide = self.concatenate_low_rank(grad, grad_a)
        if wide is not None:
            return torch.mm(wide, self.weight_and_a()), grad_a, grads_b
        grad_x = torch.mm(grad_a, self.a)
        if seeds is not None:
            grad_x = hashed_dropout(grad_x, seeds, self.dropout)
        return self.add_transposed_product(grad_x, grad), grad_a, grads_b

    def by_layer(self, stacked: Tensor) -> Tensor:
        """(tokens, layers * width) -> (layers, tokens, width), the same memory."""
        return stacked.unflatten(1, (len(self.layers), -1)).transpose(0, 1)

    def grad_of_x_a(self, grad: Tensor, out: Tensor) -> Tensor:
        """g B, written into `out` (tokens, sum of ranks)."""
        if self.is_batch:
            torch.bmm(self.by_layer(grad), self.b_per_layer, out=self.by_layer(out))
            return out
        return torch.mm(grad, self.b, out=out)

    def grads_of_b(self, grad: Tensor, x_a: Tensor) -> list[Tensor]:
        dtype = self.parameters[-1].dtype
        if self.is_batch:
            return list(matmul_to_dtype(self.by_layer(grad).transpose(1, 2), self.by_layer(x_a), dtype))
        whole = matmul_to_dtype(grad.T, x_a, dtype)
        return [whole[place] for place in self.diagonal]

    def grads_of_a(self, x: Tensor, grad_a: Tensor, seeds: Tensor | None) -> tuple[Tensor, ...]:
        dropped = x if seeds is None else hashed_dropout(x, seeds, self.dropout)
        return matmul_to_dtype(grad_a.T, dropped, self.parameters[0].dtype).mul_(self.scale).split(self.ranks)


def block_scales(state: "QuantState") -> Tensor:
    """Of the blocks of one 4-bit weight."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def matmul_to_dtype(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product, or a batch of them, whose sums are rounded to `dtype`: on a GPU once, without a pass to widen them."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.is_cuda and left.dtype != dtype:
        return multiply(left, right, out_dtype=dtype)
    return multiply(left, right).to(dtype)


def concatenate_and_rebind(parts: list[Tensor], owners: list, name: str) -> Tensor:
    """The parts one after the other in one tensor; `name` of each owner becomes its part of it."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    for owner, part in zip(owners, whole.split([len(part) for part in parts]), strict=True):
        upstream.replace(owner, name, part)
    return whole


def refresh_before_forward(stacks: list[ProjectionStack], model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each pass: the adapters' 16-bit copies follow the fp32 masters, all of them in a few launches."""
    cache = upstream.cache_of(kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return  # a next token of a generation: nothing was trained since the prompt
    refresh_stacks(stacks)


@torch.no_grad()
def refresh_stacks(stacks: list[ProjectionStack]) -> None:
    device_type = stacks[0].bases[0].weight.device.type
    autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    for stack in stacks:
        stack.refresh(autocast_dtype)
    pairs = [pair for stack in stacks for pair in zip(stack.copies, stack.parameters, strict=True)]
    # In two calls: copies into columns are launched one by one, and with them all of their call.
    for dense in (True, False):
        chosen = [pair for pair in pairs if pair[0].is_contiguous() is dense]
        if chosen:
            torch._foreach_copy_(*map(list, zip(*chosen, strict=True)))
    torch._foreach_mul_(
        [a for stack in stacks for a in stack.copies[: len(stack.layers)]],
        [scale for stack in stacks for scale in stack.scales],
    )
    for stack in stacks:
        if stack.joined is not None:
            stack.joined[sum(stack.sizes) :, : stack.in_features] = stack.a
