"""LoRA layers that read the same activation, as one matrix product with their frozen weights.

PEFT adds the low-rank part to a product that is already rounded to 16 bits. Most of what is smaller than half a unit in
its last place is then lost: at a learning rate of 1.4e-5 and a rank of 64, 99 % of what the first step taught, 86 %
after ten steps, 59 % after thirty. One product over joined columns rounds the sum once. `addmm` does not help: cuBLAS
(13, on an H200) rounds the product before it adds; the CPU does not.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from finetuning import upstream
from finetuning.kernels.dropout import hashed_dropout
from finetuning.kernels.frozen_weights import frozen_weights_of


class ProjectionStack:
    """LoRA layers of PEFT that read the same activation: y = [x, s A x] [W, B]^T with W = [W_1; W_2; ...].

    Without dropout the gradient of x is one product too: [g, g B] [W; s A].

    Of DoRA (arXiv 2402.09353) each output is also multiplied by m / |W + s B A|, whose norm counts as a constant.

    `frozen` holds W (`frozen_weights.py`). The adapters are stacked as `a` = s A (sum of ranks, in) and as the
    block-diagonal `b` (sum of out, sum of ranks), in the dtype of the products; `b` is None where layers of one shape keep
    `b_per_layer` (layers, out, rank) alone. `allocate_input` makes x with room for
    the columns s A x, `allocate_grad` does the same for g and g B.

    Dropout is drawn once for the stack, because its layers read the same activation; each element is dropped as often
    as PEFT drops it. `refresh_stacks` must run before each forward pass of the model; of sharded weights, of each
    decoder layer.
    """

    def __init__(self, layers: list[nn.Module], *, sharded: bool = False):
        self.layers = layers
        self.adapter = layers[0].active_adapters[0]
        self.sizes = [layer.out_features for layer in layers]
        self.in_features = layers[0].in_features
        self.ranks = [layer.r[self.adapter] for layer in layers]
        self.scales = [layer.scaling[self.adapter] for layer in layers]
        # Rows and columns of each layer's B in the block-diagonal one, and of its gradient.
        spans = zip(accumulate(self.sizes), self.sizes, accumulate(self.ranks), self.ranks, strict=True)
        self.b_blocks = [(slice(row - size, row), slice(column - rank, column)) for row, size, column, rank in spans]
        # Layers of one shape are a batch of small products. Else one product multiplies the zeros beside each B too.
        self.is_batch = len(layers) > 1 and len(set(self.sizes)) == len(set(self.ranks)) == 1
        self.dropout = getattr(layers[0].lora_dropout[self.adapter], "p", 0.0)
        self.is_dora = self.adapter in layers[0].lora_variant  # the one variant that is fused
        self.frozen = frozen_weights_of(layers, sharded=sharded)
        self.fp8_weight = None  # `fp8_backward.Fp8Weight`, where gradients pass through W in FP8
        self.is_active = True
        self.placement: tuple | None = None

    def adapters(self) -> list[Tensor]:
        """The parameters: every A (rank, in), then every B (out, rank), then DoRA's magnitudes m (out)."""
        kinds = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if self.is_dora else [])]
        return [getattr(layer, kind)[self.adapter].weight for kind in kinds for layer in self.layers]

    def refresh(self, autocast_dtype: torch.dtype | None) -> None:
        """Follow layers that changed since the last pass; the caller then fills `copies` from `parameters`.

        Products run in autocast's type where it is on, else in the type of the frozen weights.
        """
        first = self.layers[0]
        self.follow_switch()
        self.parameters = self.adapters()
        self.uses_dropout = self.dropout > 0 and first.training
        placement = (autocast_dtype or self.frozen.dtype, self.frozen.dtype, self.frozen.device)
        if placement != self.placement:
            self.placement, (self.dtype, _, device) = placement, placement
            self.a = torch.empty(sum(self.ranks), self.in_features, dtype=self.dtype, device=device)
            self.scale = torch.cat([torch.full((rank, 1), s) for rank, s in zip(self.ranks, self.scales, strict=True)])
            self.scale = self.scale.to(device)
            self.frozen.reset()
            if self.is_batch and self.frozen.joins_adapters and not self.is_dora:  # whose norms read B whole
                self.bind_b_per_layer()
            else:
                self.bind_b(torch.zeros(sum(self.sizes), sum(self.ranks), dtype=self.dtype, device=device))
            self.output_scale = torch.empty(sum(self.sizes) if self.is_dora else 0, device=device)
        self.output_scale_is_old = self.is_dora
        self.frozen.refresh(self)

    def follow_switch(self) -> None:
        """Note whether the layers' adapter is switched on and not merged."""
        first = self.layers[0]
        self.is_active = not first.disable_adapters and not first.merged and first.active_adapters == [self.adapter]

    def bind_b(self, b: Tensor) -> None:
        """Let `b` (sum of out, sum of ranks), zero outside of the blocks, be the block-diagonal B."""
        self.b = b
        self.copies = [*self.a.split(self.ranks), *(b[block] for block in self.b_blocks)]
        if self.is_batch:
            self.b_per_layer = self.blocks_of(b)

    def bind_b_per_layer(self) -> None:
        """Keep each B without the zeros beside it."""
        self.b = None
        self.b_per_layer = self.a.new_empty(len(self.layers), self.sizes[0], self.ranks[0])
        self.copies = [*self.a.split(self.ranks), *self.b_per_layer]

    def blocks_of(self, b: Tensor) -> Tensor:
        """View (layers, out, rank) of the blocks of a block-diagonal `b`, of layers of one shape."""
        layers = len(self.layers)
        return b.unflatten(0, (layers, -1)).unflatten(2, (layers, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def write_b(self, columns: Tensor) -> None:
        """Write the block-diagonal B into `columns` (sum of out, sum of ranks), of stride (any, 1)."""
        if self.b is not None:
            columns.copy_(self.b)
        else:
            self.blocks_of(columns.zero_()).copy_(self.b_per_layer)

    def add_low_rank(self, y: Tensor, x_a: Tensor) -> Tensor:
        """y (tokens, sum of out) += x_a B^T, in place; x_a is (tokens, sum of ranks)."""
        if self.b is not None:
            return y.addmm_(x_a, self.b.T)
        self.split_by_layer(y).baddbmm_(self.split_by_layer(x_a), self.b_per_layer.transpose(1, 2))
        return y

    def row_length(self, width: int) -> int:
        """Stride of a row: `width` and the low-rank columns, padded to 64 elements, where products are fast."""
        return -(-(width + sum(self.ranks)) // 64) * 64

    def allocate_rows(self, rows: int, width: int) -> Tensor:
        """Memory for (rows, width + sum of ranks)."""
        # oneDNN's AMX kernels read behind a row and multiply by zero: NaN there would spread.
        allocate = self.a.new_empty if self.a.is_cuda else self.a.new_zeros
        return allocate(rows, self.row_length(width))[:, : width + sum(self.ranks)]

    def allocate_input(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Memory for x (tokens, in), and the same extended by low-rank columns, (tokens, in + sum of ranks).

        INT8 products read both parts where they are.
        """
        if not self.frozen.joins_adapters:
            return self.a.new_empty(tokens, self.in_features), None
        extended = self.allocate_rows(tokens, self.in_features)
        return extended[:, : self.in_features], extended

    def allocate_grad(self, tokens: int, seeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Memory for the gradient of y (tokens, sum of out), and the same extended, where x's will be one product."""
        if not self.gradient_is_one_product(seeds):
            return self.a.new_empty(tokens, sum(self.sizes)), None
        extended = self.allocate_rows(tokens, sum(self.sizes))
        return extended[:, : sum(self.sizes)], extended

    def concatenate_low_rank(self, first: Tensor, low_rank: Tensor) -> Tensor:
        """A copy of both, (tokens, width + sum of ranks)."""
        rows, width = first.shape
        if self.row_length(width) == width + sum(self.ranks):
            return torch.cat([first, low_rank], dim=1)  # in half the time of two copies
        extended = self.allocate_rows(rows, width)
        extended[:, :width], extended[:, width:] = first, low_rank
        return extended

    def gradient_is_one_product(self, seeds: Tensor | None) -> bool:
        """Whether the gradient of x is [g, g B] [W; s A]."""
        return self.frozen.joins_adapters and self.fp8_weight is None and seeds is None

    def weight(self) -> Tensor:
        """W, (sum of out, in), in the dtype of the products."""
        return self.frozen.weight(self)

    def draw_seeds(self) -> Tensor | None:
        """Two 31-bit seeds of this pass's dropout mask, or None without dropout."""
        # The device's generator draws them: activation checkpointing rewinds it before it recomputes a layer.
        return torch.randint(2**31, (2,), device=self.a.device) if self.uses_dropout else None

    def forward(self, x: Tensor, seeds: Tensor | None, extended: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (tokens, in) -> y (tokens, sum of out), and what `backward` needs: s A x (tokens, sum of ranks).

        Of DoRA it has y before its scale behind it, (tokens, sum of ranks + sum of out). `extended` is what `allocate_input`
        gave with x; without it x is copied.
        """
        x_a = torch.mm(x if seeds is None else hashed_dropout(x, seeds, self.dropout), self.a.T)
        if not self.frozen.joins_adapters:
            return self.frozen.product(self, x, x_a), x_a
        if extended is None:
            extended = self.concatenate_low_rank(x, x_a)
        else:
            extended[:, self.in_features :] = x_a
        y = torch.mm(extended, self.frozen.weight_and_b(self).T)
        return (self.scaled(y), torch.cat([x_a, y], dim=1)) if self.is_dora else (y, x_a)

    def backward(
        self, grad: Tensor, kept: Tensor, seeds: Tensor | None, needs_grad: bool, extended: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Gradient of x (None when nothing below is trained), of s A x, and of every B and magnitude.

        `kept` is of `forward`, `extended` what `allocate_grad` gave with grad. Without it grad is copied where it is narrower
        than x, so that less is written twice.
        """
        x_a, grads_m = kept[:, : sum(self.ranks)], []
        if self.is_dora:
            grads_m = self.grads_of_magnitudes(grad, kept[:, sum(self.ranks) :])
            # In memory of its own, but where it is the caller's.
            grad = torch.mul(grad, self.output_scale, out=torch.empty_like(grad) if extended is None else grad)
        grads_b = self.grads_of_b(grad, x_a) + grads_m
        room = grad.new_empty(len(grad), sum(self.ranks)) if extended is None else extended[:, grad.shape[1] :]
        grad_a = self.grad_of_x_a(grad, room)
        if not needs_grad:
            return None, grad_a, grads_b
        if extended is None and grad.shape[1] < self.in_features and self.gradient_is_one_product(seeds):
            extended = self.concatenate_low_rank(grad, grad_a)
        if extended is not None:
            return torch.mm(extended, self.frozen.weight_and_a(self)), grad_a, grads_b
        grad_x = torch.mm(grad_a, self.a)
        if seeds is not None:
            grad_x = hashed_dropout(grad_x, seeds, self.dropout)
        return self.add_grad_through_weight(grad_x, grad), grad_a, grads_b

    def add_grad_through_weight(self, grad_x: Tensor, grad: Tensor) -> Tensor:
        """grad_x (tokens, in) += grad W, in place; grad is (tokens, sum of out)."""
        if self.fp8_weight is not None:
            return self.fp8_weight.add_product(grad_x, grad)
        return grad_x.addmm_(grad, self.weight())

    def scaled(self, y: Tensor) -> Tensor:
        """y (tokens, sum of out) times DoRA's m / |W + s B A|, rounded once to the dtype of y."""
        if self.output_scale_is_old:  # of sharded weights only now, while they are here
            weight, b = self.weight(), self.b.float()
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
            # |W + D|^2 = |W|^2 + 2 W D + |D|^2 by rows, without the matrix D = B (s A).
            squares += 2 * (torch.mm(weight, self.a.T).float() * b).sum(1)
            squares += (torch.mm(b, torch.mm(self.a, self.a.T).float()) * b).sum(1)
            self.output_scale.copy_(torch.cat(self.parameters[-len(self.layers) :]).div(squares.sqrt_()))
            self.output_scale_is_old = False
        return torch.mul(y, self.output_scale, out=torch.empty_like(y))

    def grads_of_magnitudes(self, grad: Tensor, y: Tensor) -> list[Tensor]:
        """Gradient of each layer's m (out): that of the outputs times y before its scale, over the norm."""
        magnitudes = torch.cat(self.parameters[-len(self.layers) :])
        full = grad.to(torch.float32, copy=True).mul_(y).sum(0).mul_(self.output_scale).div_(magnitudes)
        return list(full.to(magnitudes.dtype).split(self.sizes))

    def split_by_layer(self, stacked: Tensor) -> Tensor:
        """(tokens, layers * width) -> (layers, tokens, width), the same memory."""
        return stacked.unflatten(1, (len(self.layers), -1)).transpose(0, 1)

    def grad_of_x_a(self, grad: Tensor, out: Tensor) -> Tensor:
        """g B, written into `out` (tokens, sum of ranks)."""
        if self.is_batch:
            torch.bmm(self.split_by_layer(grad), self.b_per_layer, out=self.split_by_layer(out))
            return out
        return torch.mm(grad, self.b, out=out)

    def grads_of_b(self, grad: Tensor, x_a: Tensor) -> list[Tensor]:
        """Gradient of each B (out, rank), in the dtype of the parameters."""
        dtype = self.parameters[0].dtype
        if self.is_batch:
            return list(matmul_to_dtype(self.split_by_layer(grad).transpose(1, 2), self.split_by_layer(x_a), dtype))
        full = matmul_to_dtype(grad.T, x_a, dtype)
        return [full[block] for block in self.b_blocks]

    def grads_of_a(self, x: Tensor, grad_a: Tensor, seeds: Tensor | None) -> tuple[Tensor, ...]:
        """Gradient of each A (rank, in), in the dtype of the parameters."""
        dropped = x if seeds is None else hashed_dropout(x, seeds, self.dropout)
        return matmul_to_dtype(grad_a.T, dropped, self.parameters[0].dtype).mul_(self.scale).split(self.ranks)


def refresh_before_forward(stacks: list[ProjectionStack], model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the model: `refresh_stacks`, except for the next token of a generation."""
    cache = upstream.cache_of(kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return  # nothing was trained since the prompt
    refresh_stacks(stacks)


@torch.no_grad()
def refresh_stacks(stacks: list[ProjectionStack]) -> None:
    """Copy the fp32 adapters of all `stacks` into the dtype of the products, in a few kernel launches."""
    device_type = stacks[0].frozen.device.type
    autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    for stack in stacks:
        stack.refresh(autocast_dtype)
    pairs = [pair for stack in stacks for pair in zip(stack.copies, stack.parameters, strict=not stack.is_dora)]
    # In two calls: one strided copy makes `_foreach_copy_` launch every copy of its call separately.
    for dense in (True, False):
        chosen = [pair for pair in pairs if pair[0].is_contiguous() is dense]
        if chosen:
            torch._foreach_copy_(*map(list, zip(*chosen, strict=True)))
    torch._foreach_mul_(
        [a for stack in stacks for a in stack.copies[: len(stack.layers)]],
        [scale for stack in stacks for scale in stack.scales],
    )
    for stack in stacks:
        stack.frozen.keep_a(stack.a)


def matmul_to_dtype(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product, or a batch of them, in `dtype`; a GPU rounds the fp32 sums to it once, without a cast."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.is_cuda and left.dtype != dtype:
        return multiply(left, right, out_dtype=dtype)
    return multiply(left, right).to(dtype)
