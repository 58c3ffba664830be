"""Llama, Mistral, Qwen2, Gemma and Gemma 3 decoder layers with PEFT's LoRA, computed in fewer passes over memory.

PEFT computes y = W x + s B A x in four steps (a cast of x to fp32, two products, a scale, an addition), and autograd
keeps each result. Here a decoder layer is four products of stacked weights with hand-written gradients:

    norm -> [q; k; v] -> rotary    attention    o + residual    norm -> [gate; up] -> activation -> down + residual

Gemma 3 also has a norm for each head of q and k, and one between each last product and its residual.

- Products run in the 16-bit type of the base. Adapters stay fp32 and are cast once per step.
- The low-rank part is more columns of the same product, in both passes (`lora_projections.py`).
- Frozen weights get no gradient.
- Norms, activations and dropout masks are recomputed in the backward pass, not kept.

After LoRAFusion (arXiv 2510.00206) and Unsloth's fast_lora.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from finetuning import upstream
from finetuning.kernels.frozen_weights import FourBitWeights, stack_by_way_of_main_memory
from finetuning.kernels.gated_mlp import gated_activation, gated_activation_backward
from finetuning.kernels.lora_projections import ProjectionStack, refresh_before_forward, refresh_stacks
from finetuning.kernels.rms_norm import rms_norm, rms_norm_backward
from finetuning.kernels.rotary import split_and_rotate, split_and_rotate_backward
from finetuning.models.parts import base_model_of, has_sliding_window

try:
    from peft.tuners.lora import Linear4bit as LoraLinear4bit

    LORA_CLASSES = (LoraLinear, LoraLinear4bit)
except ImportError:
    LORA_CLASSES = (LoraLinear,)


class NormQkvRotate(torch.autograd.Function):
    """(hidden, adapters) -> hidden, and rotated queries and keys, values, of rms_norm(hidden).

    hidden is (batch * tokens, width), the others (batch, tokens, heads, head width). hidden is passed through, so that
    the norm's backward kernel adds the gradient of the residual stream.
    """

    @staticmethod
    def forward(ctx, hidden, cos, sin, stack, norm, heads, bias, head_norms, *adapters):
        """`cos` and `sin` are (batch or 1, tokens, head width), `heads` the numbers of query heads and of key heads.

        `bias` is (q + k + v) and frozen, or None. `head_norms` are those of each query and key head, or None.
        """
        ctx.stack, ctx.seeds, ctx.norm = stack, stack.draw_seeds(), norm_arguments(norm)
        x, extended = stack.allocate_input(len(hidden))
        qkv, x_a = stack.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds, extended)
        if bias is not None:
            qkv += bias.to(qkv.dtype)
        ctx.heads, ctx.head_norms = heads, head_norms
        ctx.save_for_backward(hidden, x_a, cos, sin, qkv if head_norms else None)
        if head_norms:
            qkv = norm_heads(qkv, heads, head_norms)
        tokens = cos.shape[1]
        return hidden, *split_and_rotate(qkv.view(-1, tokens, qkv.shape[1]), cos, sin, heads)

    @staticmethod
    def backward(ctx, grad_residual, *grad_states):
        """Gradients of the residual stream, of queries, keys and values -> of hidden, every A and every B."""
        hidden, x_a, cos, sin, qkv = ctx.saved_tensors
        grad, extended = ctx.stack.allocate_grad(len(hidden), ctx.seeds)
        split_and_rotate_backward(*grad_states, cos, sin, grad)
        if qkv is not None:
            backward_through_head_norms(qkv, ctx.heads, ctx.head_norms, grad)
        needs_grad = ctx.needs_input_grad[0]
        grad_x, grad_a, grads_b = ctx.stack.backward(grad, x_a, ctx.seeds, needs_grad, extended)
        grad_hidden, x = backward_through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
        return grad_hidden, *[None] * 7, *ctx.stack.grads_of_a(x, grad_a, ctx.seeds), *grads_b


class Project(torch.autograd.Function):
    """(x (tokens, in), residual or None, adapters) -> projection of x (tokens, out), plus the residual."""

    @staticmethod
    def forward(ctx, x, residual, stack, output_norm, *adapters):
        """The residual, if any, is (tokens, out), and may have another dtype than x; `output_norm` is the projection's, or None."""
        ctx.stack, ctx.seeds, ctx.output_norm = stack, stack.draw_seeds(), output_norm
        y, x_a = stack.forward(x, ctx.seeds)
        ctx.save_for_backward(x, x_a, y if output_norm else None)
        y = normed_output(y, output_norm)
        return y if residual is None else add_residual(y, residual)

    @staticmethod
    def backward(ctx, grad):
        """Gradient (tokens, out) -> gradients of x, of the residual, every A and every B."""
        x, x_a, y = ctx.saved_tensors
        stack = ctx.stack
        grad_y = backward_through_output_norm(y, ctx.output_norm, grad.to(x.dtype))
        grad_x, grad_a, grads_b = stack.backward(grad_y, x_a, ctx.seeds, ctx.needs_input_grad[0])
        grad_residual = grad if ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, None, None, *stack.grads_of_a(x, grad_a, ctx.seeds), *grads_b


class NormMlp(torch.autograd.Function):
    """hidden (tokens, width), adapters -> hidden + down(activation(gate) * up), gate and up of rms_norm(hidden)."""

    @staticmethod
    def forward(ctx, hidden, gate_up, down, norm, is_gelu, output_norm, *adapters):
        """`gate_up` and `down` are the layer's stacks, `is_gelu` says which activation; `output_norm` is down's, or None."""
        ctx.gate_up, ctx.down, ctx.norm, ctx.is_gelu = gate_up, down, norm_arguments(norm), is_gelu
        ctx.output_norm = output_norm
        ctx.seeds = gate_up.draw_seeds(), down.draw_seeds()
        x, extended = gate_up.allocate_input(len(hidden))
        stacked, x_a = gate_up.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds[0], extended)
        x, extended = down.allocate_input(len(hidden))
        y, activated_a = down.forward(gated_activation(stacked, is_gelu, x), ctx.seeds[1], extended)
        ctx.save_for_backward(hidden, x_a, stacked, activated_a, y if output_norm else None)
        return add_residual(normed_output(y, output_norm), hidden)

    @staticmethod
    def backward(ctx, grad_residual):
        """Gradient (tokens, width) -> gradients of hidden, and of A and B of gate, up and down."""
        hidden, x_a, stacked, activated_a, y = ctx.saved_tensors
        gate_up, down, seeds = ctx.gate_up, ctx.down, ctx.seeds
        grad_y = backward_through_output_norm(y, ctx.output_norm, grad_residual.to(stacked.dtype))
        grad_x, grad_a, down_grads_b = down.backward(grad_y, activated_a, seeds[1], True)
        grad, extended = gate_up.allocate_grad(len(hidden), seeds[0])
        activated = gated_activation_backward(stacked, grad_x, ctx.is_gelu, grad)
        down_grads = *down.grads_of_a(activated, grad_a, seeds[1]), *down_grads_b
        del grad_x, activated
        grad_x, grad_a, grads_b = gate_up.backward(grad, x_a, seeds[0], ctx.needs_input_grad[0], extended)
        grad_hidden, x = backward_through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
        return grad_hidden, *[None] * 5, *gate_up.grads_of_a(x, grad_a, seeds[0]), *grads_b, *down_grads


def norm_arguments(norm: nn.Module) -> tuple[Tensor, float, float]:
    """Weight, offset, epsilon; Gemma's norm multiplies by 1 + weight."""
    is_gemma = isinstance(norm, (GemmaRMSNorm, Gemma3RMSNorm))
    return (norm.weight, 1.0, norm.eps) if is_gemma else (norm.weight, 0.0, norm.variance_epsilon)


def norm_heads(qkv: Tensor, heads: tuple[int, int], norms: tuple[nn.Module, nn.Module]) -> Tensor:
    """qkv (tokens, q + k + v) with each query and key head normed; `heads` are their numbers."""
    query, key, value = split_heads(qkv, heads, norms)
    normed = [
        rms_norm(part, *norm_arguments(norm), torch.empty_like(part)).view(len(qkv), -1)
        for part, norm in zip((query, key), norms, strict=True)
    ]
    return torch.cat([*normed, value], dim=1)


def backward_through_head_norms(
    qkv: Tensor, heads: tuple[int, int], norms: tuple[nn.Module, nn.Module], grad: Tensor
) -> None:
    """Gradient of what `norm_heads` returned -> of qkv, in place in `grad` (tokens, q + k + v)."""
    parts, grads = split_heads(qkv, heads, norms), split_heads(grad, heads, norms)
    start = 0
    for part, grad_part, norm in zip(parts, grads, norms, strict=False):
        grad_part, _ = rms_norm_backward(part, *norm_arguments(norm), grad_part, torch.zeros_like(part))
        width = grad_part.numel() // len(grad)
        grad[:, start : start + width] = grad_part.view(len(grad), width)
        start += width


def split_heads(qkv: Tensor, heads: tuple[int, int], norms: tuple[nn.Module, nn.Module]) -> tuple[Tensor, ...]:
    """Queries and keys as contiguous rows (tokens * heads, head width), and values (tokens, v)."""
    width = len(norms[0].weight)
    query, key, value = qkv.split([heads[0] * width, heads[1] * width, heads[1] * width], dim=1)
    return query.reshape(-1, width), key.reshape(-1, width), value


def normed_output(y: Tensor, norm: nn.Module | None) -> Tensor:
    """rms_norm(y), (tokens, width); y itself where there is no norm before the residual."""
    return y if norm is None else rms_norm(y, *norm_arguments(norm), torch.empty_like(y))


def backward_through_output_norm(y: Tensor | None, norm: nn.Module | None, grad: Tensor) -> Tensor:
    """Gradient of `normed_output` -> of y."""
    return grad if y is None else rms_norm_backward(y, *norm_arguments(norm), grad, torch.zeros_like(y))[0]


def backward_through_norm(
    hidden: Tensor, norm: tuple, grad_x: Tensor | None, grad_residual: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Gradient of `hidden` (None without `grad_x`), the residual's included, and the norm's output, recomputed."""
    if grad_x is None:
        return None, rms_norm(hidden, *norm, torch.empty_like(hidden, dtype=dtype))
    return rms_norm_backward(hidden, *norm, grad_x, grad_residual)


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    """The sum, in place where both have one dtype."""
    return y.add_(residual) if y.dtype == residual.dtype else y + residual


class LayerNorms(NamedTuple):
    """The norms of a decoder layer: before its products, of query and key heads, and before each residual is added."""

    attention: nn.Module
    mlp: nn.Module
    heads: tuple[nn.Module, nn.Module] | None = None
    after_attention: nn.Module | None = None
    after_mlp: nn.Module | None = None

    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        return [norm for norm in (*self[:2], *(self.heads or ()), *self[3:]) if norm is not None]


def norms_of(layer: nn.Module) -> LayerNorms:
    """By their names in transformers: what Llama's layer calls `post_attention_layernorm` comes before its MLP."""
    if not isinstance(layer, Gemma3DecoderLayer):
        return LayerNorms(layer.input_layernorm, layer.post_attention_layernorm)
    return LayerNorms(
        layer.input_layernorm,
        layer.pre_feedforward_layernorm,
        (layer.self_attn.q_norm, layer.self_attn.k_norm),
        layer.post_attention_layernorm,
        layer.post_feedforward_layernorm,
    )


class FusedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer with LoRA on all seven projections; parameters keep their places and names.

    `supervised_rows` (optional, 1-D: positions in the flattened (batch * tokens)): after its attention the last layer
    computes these rows only and returns zeros elsewhere, because the loss reads no other row. With a cache, or where
    the adapters are disabled or merged, transformers' and PEFT's own code runs.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        supervised_rows: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states (batch, tokens, width) -> the same shape; other arguments are transformers'."""
        has_cache = upstream.cache_of(kwargs) is not None
        if self.fused_qkv.frozen.is_sharded and not has_cache:
            # Here and not before the model: only this layer's weights are all-gathered now.
            refresh_stacks(projection_stacks(self))
        if has_cache or not self.fused_qkv.is_active:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in upstream.CACHE}
        attention = self.self_attn
        batch, tokens, width = hidden_states.shape
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        with without_autocast(hidden_states):
            hidden, *states = NormQkvRotate.apply(
                hidden_states.reshape(-1, width),
                *position_embeddings,
                self.fused_qkv,
                self.fused_norms.attention,
                self.fused_heads,
                stacked_bias(self.fused_qkv),
                self.fused_norms.heads,
                *self.fused_qkv.parameters,
            )
            attended, _ = attend(
                attention,
                *(state.transpose(1, 2) for state in states),
                attention_mask,
                dropout=attention.attention_dropout if self.training else 0.0,
                scaling=attention.scaling,
                sliding_window=getattr(attention, "sliding_window", None),
                **kwargs,
            )
            attended = attended.reshape(batch * tokens, -1)
            only_supervised = self.is_last and supervised_rows is not None
            if only_supervised:
                attended, hidden = attended[supervised_rows], hidden[supervised_rows]
            hidden = Project.apply(
                attended, hidden, self.fused_o, self.fused_norms.after_attention, *self.fused_o.parameters
            )
            hidden = NormMlp.apply(
                hidden,
                self.fused_gate_up,
                self.fused_down,
                self.fused_norms.mlp,
                self.is_gelu,
                self.fused_norms.after_mlp,
                *self.fused_gate_up.parameters,
                *self.fused_down.parameters,
            )
            if only_supervised:
                hidden = hidden.new_zeros(batch * tokens, width).index_copy(0, supervised_rows, hidden)
        return hidden.view(batch, tokens, width)


@upstream.overrides
class FusedLlamaDecoderLayer(FusedDecoderLayer, LlamaDecoderLayer):
    """Llama's layer; `fuse_lora` makes it the class of an existing one."""


@upstream.overrides
class FusedMistralDecoderLayer(FusedDecoderLayer, MistralDecoderLayer):
    """Mistral's layer without a sliding window; `fuse_lora` makes it the class of an existing one."""


@upstream.overrides
class FusedQwen2DecoderLayer(FusedDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's layer, whose queries, keys and values have biases; `fuse_lora` makes it the class of an existing one."""


@upstream.overrides
class FusedGemmaDecoderLayer(FusedDecoderLayer, GemmaDecoderLayer):
    """Gemma's layer; `fuse_lora` makes it the class of an existing one."""


@upstream.overrides
class FusedGemma3DecoderLayer(FusedDecoderLayer, Gemma3DecoderLayer):
    """Gemma 3's layer, with norms behind its products and sliding windows; `fuse_lora` makes it the class of an existing one."""


@upstream.overrides
class FusedLoraLinear(LoraLinear):
    """A LoRA layer outside of a decoder layer, such as one of the vision tower's."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of the products; with further arguments PEFT's code runs."""
        if args or kwargs or not self.fused.is_active:
            return super().forward(x, *args, **kwargs)
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1]).to(self.fused.dtype)
            y = Project.apply(flat, None, self.fused, None, *self.fused.parameters)
            bias = self.get_base_layer().bias
            y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


def stacked_bias(stack: ProjectionStack) -> Tensor | None:
    """The frozen biases of a stack's layers, one behind the other (out); None without."""
    biases = [layer.get_base_layer().bias for layer in stack.layers]
    return None if biases[0] is None else torch.cat(biases)


def projection_stacks(layer: FusedDecoderLayer) -> list[ProjectionStack]:
    """The four of a layer, in the order of computation: qkv, o, gate and up, down."""
    return [layer.fused_qkv, layer.fused_o, layer.fused_gate_up, layer.fused_down]


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context without autocast on the tensor's device."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


# Layers with a norm before attention and one before the MLP: these can also be sharded, captured and answer packed.
TWO_NORM_LAYERS = {
    LlamaDecoderLayer: FusedLlamaDecoderLayer,
    MistralDecoderLayer: FusedMistralDecoderLayer,
    Qwen2DecoderLayer: FusedQwen2DecoderLayer,
    GemmaDecoderLayer: FusedGemmaDecoderLayer,
}
FUSED_LAYERS = {**TWO_NORM_LAYERS, Gemma3DecoderLayer: FusedGemma3DecoderLayer}
IS_GELU = {SiLUActivation: False, nn.SiLU: False, GELUTanh: True}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fuse_lora(model: nn.Module, *, sharded: bool = False) -> int:
    """Switch PEFT's LoRA layers of `model` to the fused computation, in place. Returns how many were switched.

    Anything else than LoRA, or DoRA without dropout, with one adapter on a frozen linear layer (8 bit, other biases in a
    decoder) keeps PEFT's code. Adapter names, saving, loading, merging and disabling stay PEFT's. Generation with a cache runs PEFT's
    code too.

    `sharded`: a strategy shards the frozen weights. It must then all-gather decoder layers in one piece (ZeRO-3:
    `deepspeed_zero.all_gather_whole_layers`; FSDP2: `fsdp2.set_wrap_classes`), and layers outside of decoder layers
    keep PEFT's code.
    """
    decoders = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    fused_decoders = [layer for layer in decoders if fuse_decoder_layer(layer, sharded=sharded)]
    fused = len(PROJECTIONS) * len(fused_decoders)
    if decoders and decoders[-1] in fused_decoders:
        decoders[-1].is_last = True
    in_decoders = {id(module) for layer in fused_decoders for module in layer.modules()}
    for module in model.modules():
        if type(module) is LoraLinear and id(module) not in in_decoders and is_plain_lora(module) and not sharded:
            module.fused = ProjectionStack([module])
            module.__class__ = FusedLoraLinear
            fused += 1
    if fused and not sharded:
        stacks = stacks_of(model)
        base_model_of(model).register_forward_pre_hook(partial(refresh_before_forward, stacks), with_kwargs=True)
    return fused


def stacks_of(model: nn.Module) -> list[ProjectionStack]:
    """Every stack of a fused model."""
    return [value for module in model.modules() for value in vars(module).values() if type(value) is ProjectionStack]


def stack_4bit_weights(model: nn.Module) -> None:
    """Stack the 4-bit weights of a fused model now, without holes in the GPU's memory; the first pass would do it with."""
    stack_by_way_of_main_memory(
        [stack.frozen for stack in stacks_of(model) if isinstance(stack.frozen, FourBitWeights)]
    )


def fuse_decoder_layer(layer: nn.Module, *, sharded: bool) -> bool:
    """Make `layer` a FusedDecoderLayer, in place, if all seven projections have plain LoRA. Returns whether it is."""
    by_name = {name.split(".")[-1]: child for name, child in layer.named_modules() if name.endswith("_proj")}
    linear_layers = [by_name[name] for name in PROJECTIONS]
    attention, norms = layer.self_attn, norms_of(layer)
    if not all(map(is_plain_lora, linear_layers)):
        return False
    has_bias = [linear.get_base_layer().bias is not None for linear in linear_layers]
    # Those of queries, keys and values, as Qwen2 has them; sharded ones would have to be gathered too.
    if has_bias not in ([False] * 7, [True] * 3 + [False] * 4) or (any(has_bias) and sharded):
        return False
    if any(norm.weight.requires_grad for norm in norms.modules()) or type(layer.mlp.act_fn) not in IS_GELU:
        return False
    is_gemma3 = type(layer) not in TWO_NORM_LAYERS  # its attention gets its window by the mask
    if (is_gemma3 and sharded) or (has_sliding_window(attention.config) and not is_gemma3):
        return False
    query, key, value, output, gate, up, down = linear_layers
    layer.fused_qkv = ProjectionStack([query, key, value], sharded=sharded)
    layer.fused_o = ProjectionStack([output], sharded=sharded)
    layer.fused_gate_up = ProjectionStack([gate, up], sharded=sharded)
    layer.fused_down = ProjectionStack([down], sharded=sharded)
    layer.fused_heads = tuple(projection.out_features // attention.head_dim for projection in (query, key))
    layer.fused_norms = norms
    layer.is_gelu = IS_GELU[type(layer.mlp.act_fn)]
    layer.is_last = False
    layer.__class__ = FUSED_LAYERS[type(layer)]
    return True


def is_plain_lora(module: nn.Module) -> bool:
    """Whether `module` is LoRA with one active adapter on a frozen linear layer, or DoRA without dropout.

    With dropout PEFT's DoRA multiplies by the base twice: by x, and by what dropout left of it.
    """
    if type(module) not in LORA_CLASSES or len(module.active_adapters) != 1:
        return False
    adapter = module.active_adapters[0]
    base = module.get_base_layer()
    return (
        adapter in module.lora_A
        and (adapter not in module.lora_variant or is_dora_without_dropout(module, adapter))
        and module.lora_B[adapter].bias is None
        and not getattr(module, "fan_in_fan_out", False)
        and isinstance(base, nn.Linear)
        and not base.weight.requires_grad
        # 4-bit weights are stacked by whole blocks.
        and base.in_features * base.out_features % getattr(base.weight, "blocksize", 1) == 0
    )


def is_dora_without_dropout(module: nn.Module, adapter: str) -> bool:
    """Whether the variant of `adapter` is DoRA, and drops nothing."""
    is_dora = isinstance(module.lora_variant[adapter], DoraLinearVariant)
    return is_dora and not getattr(module.lora_dropout[adapter], "p", 0.0)
