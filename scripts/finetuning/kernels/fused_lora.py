"""LoRA on Llama and Gemma decoders without waste: PEFT's adapters and mathematics, computed in fewer passes.

PEFT computes y = W x + s B A x by casting x to the adapter's fp32, two products, a scale and an addition, and autograd
keeps every one of them. Here a decoder layer is four products of stacked weights with hand-written gradients:

    norm -> [q; k; v] -> rotate    attend    o + residual    norm -> [gate; up] -> activation -> down + residual

Products run in the 16-bit type of the base, adapters stay fp32 and are cast once per step; the low-rank part is more
columns of the same product, forwards and backwards; frozen weights get no gradient; norms, activations and dropout masks
are computed again in the backward pass instead of kept. LoRAFusion (arXiv 2510.00206) and Unsloth's fast_lora inspired
the plan.
"""

import operator
from contextlib import nullcontext
from functools import partial
from itertools import accumulate

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

from finetuning.kernels.layer_kernels import (
    drop,
    gated_activation,
    gated_activation_backward,
    rms_norm,
    rms_norm_backward,
    split_and_rotate,
    split_and_rotate_backward,
    unpack_4bit,
)
from finetuning.models.loading import base_model_of

try:
    from bitsandbytes.functional import QuantState, dequantize_blockwise
    from peft.tuners.lora import Linear4bit as LoraLinear4bit

    LORA_CLASSES = (LoraLinear, LoraLinear4bit)
except ImportError:
    LORA_CLASSES = (LoraLinear,)


class Projections:
    """LoRA layers of PEFT that read the same activation, as one product: y = [x, s A x] [W, B]^T, W = [W_1; W_2; ...].

    The gradient of x is one product too: [g, g B] [W; s A], where nothing is dropped.

    Base weights are stacked in memory once, with columns for B behind them and rows for s A below, and the layers' own
    weights become views of the stack; 4-bit ones are stacked as they are and unpacked in one call at each use, in front of
    B or above s A. Weights that ZeRO-3 or FSDP2 divides (`divided`) come and go, and are copied there. The adapters are
    stacked as s A and as B, block-diagonal. What writes x leaves room for s A x behind each row (`new_input`), what writes
    g for g B (`new_grad`).

    One product, because then the sum is rounded to 16 bits once. PEFT adds the low-rank part to a product that is rounded
    already, where most of what is less than half a unit in its last place is lost: at a learning rate of 1.4e-5 and a
    rank of 64, 99 % of what the first step taught, 86 % after ten, 59 % after thirty. `addmm` is no way out: cuBLAS (13, on
    an H200) rounds the product before it adds (the CPU does not).

    The adapters' dropout is drawn once for all layers of the stack, because they read the same activation: elements are
    dropped as often as PEFT drops them. `refresh` must run before each forward pass of the model; where weights are
    divided, of each decoder layer.
    """

    def __init__(self, layers: list[nn.Module], *, divided: bool = False):
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
        self.is_divided = divided
        self.gradient_in_one = True
        self.in_use = True
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
        self.in_use = not first.disable_adapters and not first.merged and first.active_adapters == [self.adapter]
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
            self.hold_b(torch.zeros(sum(self.sizes), sum(self.ranks), dtype=self.dtype, device=types[2]))
        if self.is_divided:
            return
        if self.is_quantized:
            self.stack_quantized(weights)
        else:
            self.stack_weights(weights, joins=self.dtype == own_dtype)

    def hold_b(self, b: Tensor) -> None:
        self.b = b
        self.copies = [*self.a.split(self.ranks), *(b[place] for place in self.diagonal)]
        if self.is_batch:
            layers = len(self.layers)
            blocks = b.unflatten(0, (layers, -1)).unflatten(2, (layers, -1))
            self.each_b = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (layers, out, rank)

    def stack_weights(self, weights: list[nn.Parameter], *, joins: bool) -> None:
        if self.stacked and all(map(Tensor.is_set_to, weights, self.stacked)):
            return
        # First use, or somebody moved or replaced the weights.
        if joins:
            rows = sum(self.sizes)
            self.joined = self.new_rows(rows + sum(self.ranks), self.in_features)
            self.stack, b = self.joined[:rows].split([self.in_features, sum(self.ranks)], 1)
            torch.cat([weight.data for weight in weights], out=self.stack)
            self.hold_b(b.zero_())
        else:
            self.stack = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
        # Each a storage of its own: transformers, saving a merged model, cannot compare rows that lie apart in a shared one.
        self.stacked = [from_dlpack(rows) for rows in self.stack.split(self.sizes)]
        for weight, rows in zip(weights, self.stacked, strict=True):
            weight.data = rows

    def stack_quantized(self, weights: list[nn.Parameter]) -> None:
        states = [weight.quant_state for weight in weights]
        if self.stacked and all(map(operator.is_, states, self.stacked)):
            return
        self.stacked = self.states = states
        first, self.lengths = states[0], [len(state.absmax) for state in states]
        # Scales that are quantised too stay so where blocks of them end with a weight, as they do at every real size.
        if first.nested and any(length % first.state2.blocksize for length in self.lengths[:-1]):
            for state in states:
                state.absmax = scales_of(state)
                state.nested, state.state2, state.offset = False, None, None
        of_scales = [state.state2 for state in states] if first.nested else []
        # One memory for the stack and for the weights, so that none is added.
        self.stack = in_one([weight.data for weight in weights], weights, "data")
        self.absmax = in_one([state.absmax for state in states], states, "absmax")
        if of_scales:
            in_one_of_scales = in_one([state.absmax for state in of_scales], of_scales, "absmax")
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

    def new_rows(self, rows: int, width: int) -> Tensor:
        """Memory for (rows, width + sum of ranks)."""
        # oneDNN's AMX kernels read what lies behind a row, times zero, which is NaN if that is.
        allocate = self.a.new_empty if self.a.is_cuda else self.a.new_zeros
        return allocate(rows, self.row_length(width))[:, : width + sum(self.ranks)]

    def new_input(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Memory for x (tokens, in), and the same with room behind its rows, (tokens, in + sum of ranks)."""
        wide = self.new_rows(tokens, self.in_features)
        return wide[:, : self.in_features], wide

    def side_by_side(self, first: Tensor, low_rank: Tensor) -> Tensor:
        """A copy of both, (tokens, width + sum of ranks)."""
        rows, width = first.shape
        if self.row_length(width) == width + sum(self.ranks):
            return torch.cat([first, low_rank], dim=1)  # in half the time of two copies
        wide = self.new_rows(rows, width)
        wide[:, :width], wide[:, width:] = first, low_rank
        return wide

    def has_one_product(self, seeds: Tensor | None) -> bool:
        """Whether the gradient of x is one product."""
        return self.gradient_in_one and seeds is None

    def new_grad(self, tokens: int, seeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Memory for the gradient of y (tokens, sum of out), and the same with room, where x's will be one product."""
        if not self.has_one_product(seeds):
            return self.a.new_empty(tokens, sum(self.sizes)), None
        wide = self.new_rows(tokens, sum(self.sizes))
        return wide[:, : sum(self.sizes)], wide

    def write_weight(self, rows: Tensor) -> None:
        """Stacked base weights into `rows` (sum of out, in), which may lie apart."""
        if self.is_divided and self.is_quantized:
            for part, base, state in zip(rows.split(self.sizes), self.bases, self.states, strict=True):
                unpack_4bit(base.weight.detach(), scales_of(state), state.code, state.blocksize, part)
        elif self.is_divided:
            for part, base in zip(rows.split(self.sizes), self.bases, strict=True):
                part.copy_(base.weight.detach())
        elif self.is_quantized:
            state = self.states[0]
            unpack_4bit(self.stack, self.scales_of_blocks(), state.code, state.blocksize, rows)
        else:
            rows.copy_(self.stack)

    def weight(self) -> Tensor:
        """Stacked base weights, (sum of out, in)."""
        if not self.is_quantized and not self.is_divided:
            return self.stack.to(self.dtype)
        weight = self.a.new_empty(sum(self.sizes), self.in_features)
        self.write_weight(weight)
        return weight

    def weight_and_b(self) -> Tensor:
        """[W, B], (sum of out, in + sum of ranks): kept where the weights are in the products' type, else made anew."""
        if self.joined is not None:
            return self.joined[: sum(self.sizes)]
        joined = self.new_rows(sum(self.sizes), self.in_features)
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

        `wide` is what `new_input` gave with x; without it x is copied.
        """
        x_a = torch.mm(x if seeds is None else drop(x, seeds, self.dropout), self.a.T)
        if wide is None:
            wide = self.side_by_side(x, x_a)
        else:
            wide[:, self.in_features :] = x_a
        return torch.mm(wide, self.weight_and_b().T), x_a

    def backward(
        self, grad: Tensor, x_a: Tensor, seeds: Tensor | None, needs_grad: bool, wide: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Gradient of x (None when nothing below is trained), of x_a, and of every B.

        `wide` is what `new_grad` gave with grad; without it grad is copied, where that is less than x to write twice.
        """
        grads_b = self.grads_of_b(grad, x_a)
        room = grad.new_empty(len(grad), sum(self.ranks)) if wide is None else wide[:, grad.shape[1] :]
        grad_a = self.grad_of_x_a(grad, room)
        if not needs_grad:
            return None, grad_a, grads_b
        if wide is None and grad.shape[1] < self.in_features and self.has_one_product(seeds):
            wide = self.side_by_side(grad, grad_a)
        if wide is not None:
            return torch.mm(wide, self.weight_and_a()), grad_a, grads_b
        grad_x = torch.mm(grad_a, self.a)
        if seeds is not None:
            grad_x = drop(grad_x, seeds, self.dropout)
        return self.add_transposed_product(grad_x, grad), grad_a, grads_b

    def by_layer(self, stacked: Tensor) -> Tensor:
        """(tokens, layers * width) -> (layers, tokens, width), the same memory."""
        return stacked.unflatten(1, (len(self.layers), -1)).transpose(0, 1)

    def grad_of_x_a(self, grad: Tensor, out: Tensor) -> Tensor:
        """g B, written into `out` (tokens, sum of ranks)."""
        if self.is_batch:
            torch.bmm(self.by_layer(grad), self.each_b, out=self.by_layer(out))
            return out
        return torch.mm(grad, self.b, out=out)

    def grads_of_b(self, grad: Tensor, x_a: Tensor) -> list[Tensor]:
        dtype = self.parameters[-1].dtype
        if self.is_batch:
            return list(product(self.by_layer(grad).transpose(1, 2), self.by_layer(x_a), dtype))
        whole = product(grad.T, x_a, dtype)
        return [whole[place] for place in self.diagonal]

    def grads_of_a(self, x: Tensor, grad_a: Tensor, seeds: Tensor | None) -> tuple[Tensor, ...]:
        dropped = x if seeds is None else drop(x, seeds, self.dropout)
        return product(grad_a.T, dropped, self.parameters[0].dtype).mul_(self.scale).split(self.ranks)


class NormQkvRotate(torch.autograd.Function):
    """(hidden, adapters) -> hidden, and queries, keys, values of rms_norm(hidden), turned to their positions.

    `hidden` is handed through, so that the gradient of the residual stream is added inside the norm's kernel.
    """

    @staticmethod
    def forward(ctx, hidden, cos, sin, projections, norm, heads, *adapters):
        ctx.projections, ctx.seeds, ctx.norm = projections, projections.draw_seeds(), norm_arguments(norm)
        x, wide = projections.new_input(len(hidden))
        qkv, x_a = projections.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds, wide)
        ctx.save_for_backward(hidden, x_a, cos, sin)
        tokens = cos.shape[1]
        return hidden, *split_and_rotate(qkv.view(-1, tokens, qkv.shape[1]), cos, sin, heads)

    @staticmethod
    def backward(ctx, grad_residual, *grad_states):
        hidden, x_a, cos, sin = ctx.saved_tensors
        grad, wide = ctx.projections.new_grad(len(hidden), ctx.seeds)
        split_and_rotate_backward(*grad_states, cos, sin, grad)
        needs_grad = ctx.needs_input_grad[0]
        grad_x, grad_a, grads_b = ctx.projections.backward(grad, x_a, ctx.seeds, needs_grad, wide)
        grad_hidden, x = through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
        return grad_hidden, None, None, None, None, None, *ctx.projections.grads_of_a(x, grad_a, ctx.seeds), *grads_b


class Project(torch.autograd.Function):
    """(x, residual or None, adapters) -> residual + projection of x."""

    @staticmethod
    def forward(ctx, x, residual, projections, *adapters):
        ctx.projections, ctx.seeds = projections, projections.draw_seeds()
        y, x_a = projections.forward(x, ctx.seeds)
        ctx.save_for_backward(x, x_a)
        return y if residual is None else add_residual(y, residual)

    @staticmethod
    def backward(ctx, grad):
        x, x_a = ctx.saved_tensors
        projections = ctx.projections
        grad_x, grad_a, grads_b = projections.backward(grad.to(x.dtype), x_a, ctx.seeds, ctx.needs_input_grad[0])
        grad_residual = grad if ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, None, *projections.grads_of_a(x, grad_a, ctx.seeds), *grads_b


class NormMlp(torch.autograd.Function):
    """(hidden, adapters) -> hidden + down(activation(gate) * up), gate and up of rms_norm(hidden)."""

    @staticmethod
    def forward(ctx, hidden, gate_up, down, norm, is_gelu, *adapters):
        ctx.gate_up, ctx.down, ctx.norm, ctx.is_gelu = gate_up, down, norm_arguments(norm), is_gelu
        ctx.seeds = gate_up.draw_seeds(), down.draw_seeds()
        x, wide = gate_up.new_input(len(hidden))
        stacked, x_a = gate_up.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds[0], wide)
        x, wide = down.new_input(len(hidden))
        y, activated_a = down.forward(gated_activation(stacked, is_gelu, x), ctx.seeds[1], wide)
        ctx.save_for_backward(hidden, x_a, stacked, activated_a)
        return add_residual(y, hidden)

    @staticmethod
    def backward(ctx, grad_residual):
        hidden, x_a, stacked, activated_a = ctx.saved_tensors
        gate_up, down, seeds = ctx.gate_up, ctx.down, ctx.seeds
        grad_y = grad_residual.to(stacked.dtype)
        grad_x, grad_a, down_grads_b = down.backward(grad_y, activated_a, seeds[1], True)
        grad, wide = gate_up.new_grad(len(hidden), seeds[0])
        activated = gated_activation_backward(stacked, grad_x, ctx.is_gelu, grad)
        down_grads = *down.grads_of_a(activated, grad_a, seeds[1]), *down_grads_b
        del grad_x, activated
        grad_x, grad_a, grads_b = gate_up.backward(grad, x_a, seeds[0], ctx.needs_input_grad[0], wide)
        grad_hidden, x = through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
        return grad_hidden, None, None, None, None, *gate_up.grads_of_a(x, grad_a, seeds[0]), *grads_b, *down_grads


def norm_arguments(norm: nn.Module) -> tuple[Tensor, float, float]:
    """Weight, offset, epsilon; Gemma's norm multiplies by 1 + weight."""
    return (norm.weight, 1.0, norm.eps) if isinstance(norm, GemmaRMSNorm) else (norm.weight, 0.0, norm.variance_epsilon)


def through_norm(
    hidden: Tensor, norm: tuple, grad_x: Tensor | None, grad_residual: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Gradient of `hidden` through the norm and past it (None without `grad_x`), and the norm's output once more."""
    if grad_x is None:
        return None, rms_norm(hidden, *norm, torch.empty_like(hidden, dtype=dtype))
    return rms_norm_backward(hidden, *norm, grad_x, grad_residual)


def scales_of(state: "QuantState") -> Tensor:
    """Of the blocks of one 4-bit weight."""
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product, or a batch of them, whose sums are rounded to `dtype`: on a GPU once, without a pass to widen them."""
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    if left.is_cuda and left.dtype != dtype:
        return multiply(left, right, out_dtype=dtype)
    return multiply(left, right).to(dtype)


def in_one(parts: list[Tensor], owners: list, name: str) -> Tensor:
    """The parts one after the other in one tensor; `name` of each owner becomes its part of it."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    for owner, part in zip(owners, whole.split([len(part) for part in parts]), strict=True):
        setattr(owner, name, part)
    return whole


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    return y.add_(residual) if y.dtype == residual.dtype else y + residual


class FusedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer with PEFT adapters on all seven projections; parameters and names stay where they are.

    `supervised_rows` (1-D, positions in the flattened (batch * tokens), optional): the last layer computes what
    follows its attention for these rows only and returns zeros elsewhere, because the loss reads no other row.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        supervised_rows: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if self.fused_qkv.is_divided and past_key_values is None:
            # Here and not before the whole model: this layer's weights have just been gathered.
            follow_adapters(projections(self))
        if past_key_values is not None or not self.fused_qkv.in_use:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        attention = self.self_attn
        batch, tokens, width = hidden_states.shape
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        with without_autocast(hidden_states):
            hidden, *states = NormQkvRotate.apply(
                hidden_states.reshape(-1, width),
                *position_embeddings,
                self.fused_qkv,
                self.input_layernorm,
                self.fused_heads,
                *self.fused_qkv.parameters,
            )
            attended, _ = attend(
                attention,
                *(state.transpose(1, 2) for state in states),
                attention_mask,
                dropout=attention.attention_dropout if self.training else 0.0,
                scaling=attention.scaling,
                **kwargs,
            )
            attended = attended.reshape(batch * tokens, -1)
            only_supervised = self.is_last and supervised_rows is not None
            if only_supervised:
                attended, hidden = attended[supervised_rows], hidden[supervised_rows]
            hidden = Project.apply(attended, hidden, self.fused_o, *self.fused_o.parameters)
            hidden = NormMlp.apply(
                hidden,
                self.fused_gate_up,
                self.fused_down,
                self.post_attention_layernorm,
                self.is_gelu,
                *self.fused_gate_up.parameters,
                *self.fused_down.parameters,
            )
            if only_supervised:
                hidden = hidden.new_zeros(batch * tokens, width).index_copy(0, supervised_rows, hidden)
        return hidden.view(batch, tokens, width)


class FusedLlamaDecoderLayer(FusedDecoderLayer, LlamaDecoderLayer):
    pass


class FusedGemmaDecoderLayer(FusedDecoderLayer, GemmaDecoderLayer):
    pass


class FusedLoraLinear(LoraLinear):
    """A single LoRA layer outside of a decoder, such as one of the vision tower's."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not self.fused.in_use:
            return super().forward(x, *args, **kwargs)
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1]).to(self.fused.dtype)
            y = Project.apply(flat, None, self.fused, *self.fused.parameters)
            bias = self.get_base_layer().bias
            y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


def projections(layer: FusedDecoderLayer) -> list[Projections]:
    return [layer.fused_qkv, layer.fused_o, layer.fused_gate_up, layer.fused_down]


def without_autocast(tensor: Tensor):
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


FUSED_LAYERS = {LlamaDecoderLayer: FusedLlamaDecoderLayer, GemmaDecoderLayer: FusedGemmaDecoderLayer}
IS_GELU = {SiLUActivation: False, nn.SiLU: False, GELUTanh: True}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fuse_lora(model: nn.Module, *, divided: bool = False) -> int:
    """Switch PEFT's LoRA layers of `model` to the fused computation, in place. Returns how many were switched.

    What is not plain LoRA with one adapter on a frozen linear layer (DoRA, 8 bit, biases in a decoder) keeps PEFT's
    own code. Adapter names, saving, loading, merging and disabling stay PEFT's. Generation with a cache runs PEFT's
    code too. Where weights are `divided`, whole decoder layers must be gathered (ZeRO-3: `divided.gather_whole_layers`;
    FSDP2: `divided.name_layers`); what is not in a decoder keeps PEFT's code there.
    """
    fused = 0
    decoders = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    for index, layer in enumerate(decoders):
        by_name = {name.split(".")[-1]: child for name, child in layer.named_modules() if name.endswith("_proj")}
        linear_layers = [by_name[name] for name in PROJECTIONS]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if not all(is_plain_lora(linear) and linear.get_base_layer().bias is None for linear in linear_layers):
            continue
        if any(norm.weight.requires_grad for norm in norms) or type(layer.mlp.act_fn) not in IS_GELU:
            continue
        query, key, value, output, gate, up, down = linear_layers
        layer.fused_qkv = Projections([query, key, value], divided=divided)
        layer.fused_o = Projections([output], divided=divided)
        layer.fused_gate_up = Projections([gate, up], divided=divided)
        layer.fused_down = Projections([down], divided=divided)
        layer.fused_heads = tuple(projection.out_features // layer.self_attn.head_dim for projection in (query, key))
        layer.is_gelu = IS_GELU[type(layer.mlp.act_fn)]
        layer.is_last = index == len(decoders) - 1
        layer.__class__ = FUSED_LAYERS[type(layer)]
        fused += len(linear_layers)
    in_decoders = {
        id(module) for layer in decoders if isinstance(layer, FusedDecoderLayer) for module in layer.modules()
    }
    for module in model.modules():
        if type(module) is LoraLinear and id(module) not in in_decoders and is_plain_lora(module) and not divided:
            module.fused = Projections([module])
            module.__class__ = FusedLoraLinear
            fused += 1
    if fused and not divided:
        stacks = [value for module in model.modules() for value in vars(module).values() if type(value) is Projections]
        base_model_of(model).register_forward_pre_hook(partial(refresh, stacks), with_kwargs=True)
    return fused


def refresh(stacks: list[Projections], model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before each pass: the adapters' 16-bit copies follow the fp32 masters, all of them in a few launches."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return  # a next token of a generation: nothing was trained since the prompt
    follow_adapters(stacks)


@torch.no_grad()
def follow_adapters(stacks: list[Projections]) -> None:
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


def is_plain_lora(module: nn.Module) -> bool:
    """One active adapter without variants on a frozen linear layer."""
    if type(module) not in LORA_CLASSES or len(module.active_adapters) != 1:
        return False
    adapter = module.active_adapters[0]
    base = module.get_base_layer()
    return (
        adapter in module.lora_A
        and adapter not in module.lora_variant
        and module.lora_B[adapter].bias is None
        and not getattr(module, "fan_in_fan_out", False)
        and isinstance(base, nn.Linear)
        and not base.weight.requires_grad
        # 4-bit weights are stacked by whole blocks.
        and base.in_features * base.out_features % getattr(base.weight, "blocksize", 1) == 0
    )
