"""LoRA on Llama and Gemma decoders without waste: PEFT's adapters and mathematics, computed in fewer passes.

PEFT computes y = W x + s B A x by casting x to the adapter's fp32, two products, a scale and an addition, and autograd
keeps every one of them. Here a decoder layer is four products of stacked weights with hand-written gradients:

    norm -> [q; k; v] -> rotate    attend    o + residual    norm -> [gate; up] -> activation -> down + residual

Products run in the 16-bit type of the base, adapters stay fp32 and are cast once per step; the low-rank part is more
columns of the same product, forwards and backwards; frozen weights get no gradient; norms, activations and dropout masks
are computed again in the backward pass instead of kept. LoRAFusion (arXiv 2510.00206) and Unsloth's fast_lora inspired
the plan.
"""

from contextlib import nullcontext
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

from finetuning import upstream
from finetuning.kernels.gated_mlp import gated_activation, gated_activation_backward
from finetuning.kernels.lora_projections import ProjectionStack, refresh_before_forward, refresh_stacks
from finetuning.kernels.rms_norm import rms_norm, rms_norm_backward
from finetuning.kernels.rotary import split_and_rotate, split_and_rotate_backward
from finetuning.models.parts import base_model_of

try:
    from peft.tuners.lora import Linear4bit as LoraLinear4bit

    LORA_CLASSES = (LoraLinear, LoraLinear4bit)
except ImportError:
    LORA_CLASSES = (LoraLinear,)


class NormQkvRotate(torch.autograd.Function):
    """(hidden, adapters) -> hidden, and queries, keys, values of rms_norm(hidden), turned to their positions.

    `hidden` is handed through, so that the gradient of the residual stream is added inside the norm's kernel.
    """

    @staticmethod
    def forward(ctx, hidden, cos, sin, projections, norm, heads, *adapters):
        ctx.projections, ctx.seeds, ctx.norm = projections, projections.draw_seeds(), norm_arguments(norm)
        x, wide = projections.allocate_input(len(hidden))
        qkv, x_a = projections.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds, wide)
        ctx.save_for_backward(hidden, x_a, cos, sin)
        tokens = cos.shape[1]
        return hidden, *split_and_rotate(qkv.view(-1, tokens, qkv.shape[1]), cos, sin, heads)

    @staticmethod
    def backward(ctx, grad_residual, *grad_states):
        hidden, x_a, cos, sin = ctx.saved_tensors
        grad, wide = ctx.projections.allocate_grad(len(hidden), ctx.seeds)
        split_and_rotate_backward(*grad_states, cos, sin, grad)
        needs_grad = ctx.needs_input_grad[0]
        grad_x, grad_a, grads_b = ctx.projections.backward(grad, x_a, ctx.seeds, needs_grad, wide)
        grad_hidden, x = backward_through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
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
        x, wide = gate_up.allocate_input(len(hidden))
        stacked, x_a = gate_up.forward(rms_norm(hidden, *ctx.norm, x), ctx.seeds[0], wide)
        x, wide = down.allocate_input(len(hidden))
        y, activated_a = down.forward(gated_activation(stacked, is_gelu, x), ctx.seeds[1], wide)
        ctx.save_for_backward(hidden, x_a, stacked, activated_a)
        return add_residual(y, hidden)

    @staticmethod
    def backward(ctx, grad_residual):
        hidden, x_a, stacked, activated_a = ctx.saved_tensors
        gate_up, down, seeds = ctx.gate_up, ctx.down, ctx.seeds
        grad_y = grad_residual.to(stacked.dtype)
        grad_x, grad_a, down_grads_b = down.backward(grad_y, activated_a, seeds[1], True)
        grad, wide = gate_up.allocate_grad(len(hidden), seeds[0])
        activated = gated_activation_backward(stacked, grad_x, ctx.is_gelu, grad)
        down_grads = *down.grads_of_a(activated, grad_a, seeds[1]), *down_grads_b
        del grad_x, activated
        grad_x, grad_a, grads_b = gate_up.backward(grad, x_a, seeds[0], ctx.needs_input_grad[0], wide)
        grad_hidden, x = backward_through_norm(hidden, ctx.norm, grad_x, grad_residual, grad.dtype)
        return grad_hidden, None, None, None, None, *gate_up.grads_of_a(x, grad_a, seeds[0]), *grads_b, *down_grads


def norm_arguments(norm: nn.Module) -> tuple[Tensor, float, float]:
    """Weight, offset, epsilon; Gemma's norm multiplies by 1 + weight."""
    return (norm.weight, 1.0, norm.eps) if isinstance(norm, GemmaRMSNorm) else (norm.weight, 0.0, norm.variance_epsilon)


def backward_through_norm(
    hidden: Tensor, norm: tuple, grad_x: Tensor | None, grad_residual: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Gradient of `hidden` through the norm and past it (None without `grad_x`), and the norm's output once more."""
    if grad_x is None:
        return None, rms_norm(hidden, *norm, torch.empty_like(hidden, dtype=dtype))
    return rms_norm_backward(hidden, *norm, grad_x, grad_residual)


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
        *,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        supervised_rows: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        has_cache = upstream.cache_of(kwargs) is not None
        if self.fused_qkv.is_sharded and not has_cache:
            # Here and not before the whole model: this layer's weights have just been gathered.
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


@upstream.overrides
class FusedLlamaDecoderLayer(FusedDecoderLayer, LlamaDecoderLayer):
    pass


@upstream.overrides
class FusedGemmaDecoderLayer(FusedDecoderLayer, GemmaDecoderLayer):
    pass


@upstream.overrides
class FusedLoraLinear(LoraLinear):
    """A single LoRA layer outside of a decoder, such as one of the vision tower's."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not self.fused.is_active:
            return super().forward(x, *args, **kwargs)
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1]).to(self.fused.dtype)
            y = Project.apply(flat, None, self.fused, *self.fused.parameters)
            bias = self.get_base_layer().bias
            y = y if bias is None else y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


def projection_stacks(layer: FusedDecoderLayer) -> list[ProjectionStack]:
    return [layer.fused_qkv, layer.fused_o, layer.fused_gate_up, layer.fused_down]


def without_autocast(tensor: Tensor):
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


FUSED_LAYERS = {LlamaDecoderLayer: FusedLlamaDecoderLayer, GemmaDecoderLayer: FusedGemmaDecoderLayer}


IS_GELU = {SiLUActivation: False, nn.SiLU: False, GELUTanh: True}


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fuse_lora(model: nn.Module, *, sharded: bool = False) -> int:
    """Switch PEFT's LoRA layers of `model` to the fused computation, in place. Returns how many were switched.

    What is not plain LoRA with one adapter on a frozen linear layer (DoRA, 8 bit, biases in a decoder) keeps PEFT's
    own code. Adapter names, saving, loading, merging and disabling stay PEFT's. Generation with a cache runs PEFT's
    code too. Where weights are `sharded`, whole decoder layers must be gathered (ZeRO-3: `deepspeed_zero.all_gather_whole_layers`;
    FSDP2: `fsdp2.set_wrap_classes`); what is not in a decoder keeps PEFT's code there.
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
        layer.fused_qkv = ProjectionStack([query, key, value], sharded=sharded)
        layer.fused_o = ProjectionStack([output], sharded=sharded)
        layer.fused_gate_up = ProjectionStack([gate, up], sharded=sharded)
        layer.fused_down = ProjectionStack([down], sharded=sharded)
        layer.fused_heads = tuple(projection.out_features // layer.self_attn.head_dim for projection in (query, key))
        layer.is_gelu = IS_GELU[type(layer.mlp.act_fn)]
        layer.is_last = index == len(decoders) - 1
        layer.__class__ = FUSED_LAYERS[type(layer)]
        fused += len(linear_layers)
    in_decoders = {
        id(module) for layer in decoders if isinstance(layer, FusedDecoderLayer) for module in layer.modules()
    }
    for module in model.modules():
        if type(module) is LoraLinear and id(module) not in in_decoders and is_plain_lora(module) and not sharded:
            module.fused = ProjectionStack([module])
            module.__class__ = FusedLoraLinear
            fused += 1
    if fused and not sharded:
        stacks = [
            value for module in model.modules() for value in vars(module).values() if type(value) is ProjectionStack
        ]
        base_model_of(model).register_forward_pre_hook(partial(refresh_before_forward, stacks), with_kwargs=True)
    return fused


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
