"""LoRA on Llama and Gemma decoders without waste: PEFT's adapters and mathematics, computed in fewer passes.

PEFT computes y = W x + s B A x by casting x to the adapter's fp32, two products, a scale and an addition, and autograd
keeps every one of them. Here a decoder layer is four products of stacked weights with hand-written gradients:

    norm -> [q; k; v]    rotate, attend    o + residual    norm -> [gate; up]    activation -> down + residual

Products run in the 16-bit type of the base, adapters stay fp32 and are cast once per use; the low-rank part is added
inside the matrix product (`addmm`); frozen weights get no gradient; norms, activations and dropout masks are computed
again in the backward pass instead of kept. What is between the products is plain torch, compiled into one kernel per
function on a GPU. LoRAFusion (arXiv 2510.00206) and Unsloth's fast_lora inspired the plan.
"""

from collections.abc import Callable
from functools import wraps

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward

try:
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit as LoraLinear4bit

    LORA_CLASSES = (LoraLinear, LoraLinear4bit)
except ImportError:
    LORA_CLASSES = (LoraLinear,)


def compiled_on_gpu(function: Callable) -> Callable:
    """One kernel on a CUDA device with Triton's reach (7.0 and newer); plain torch elsewhere."""
    kernel = torch.compile(function, fullgraph=True)

    @wraps(function)
    def choose(tensor: Tensor, *args):
        return (kernel if tensor.is_cuda else function)(tensor, *args)

    return choose


# What lies between the products. Internals in fp32 (fp64 stays fp64), one rounding at the end.


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@compiled_on_gpu
def rms_norm(hidden: Tensor, weight: Tensor, offset: float, eps: float, dtype: torch.dtype) -> Tensor:
    """hidden / rms(hidden) * (offset + weight); Gemma's offset is 1, Llama's 0."""
    wide = widen(hidden)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (offset + widen(weight))).to(dtype)


@compiled_on_gpu
def rms_norm_backward(
    hidden: Tensor, weight: Tensor, offset: float, eps: float, grad: Tensor, grad_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `hidden` through the norm and past it, and the norm's output once more (in the type of `grad`)."""
    wide = widen(hidden)
    scale = offset + widen(weight)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse_rms
    scaled = widen(grad) * scale
    through = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (through + widen(grad_residual)).to(hidden.dtype), (normed * scale).to(grad.dtype)


GELU_TANH = 0.7978845608028654  # sqrt(2 / pi)


@compiled_on_gpu
def gated_activation(gate_up: Tensor, is_gelu: bool) -> Tensor:
    gate, up = widen(gate_up).chunk(2, dim=-1)
    if is_gelu:
        activated = 0.5 * gate * (1 + torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate)))
    else:
        activated = gate * torch.sigmoid(gate)
    return (activated * up).to(gate_up.dtype)


@compiled_on_gpu
def gated_activation_backward(gate_up: Tensor, grad: Tensor, is_gelu: bool) -> tuple[Tensor, Tensor]:
    """Gradient of the stacked [gate, up], and the activation's output once more."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    if is_gelu:
        tanh = torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate))
        activated = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * GELU_TANH * (1 + 3 * 0.044715 * gate * gate)
    else:
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    wide = widen(grad)
    grad_gate_up = torch.cat([wide * up * slope, wide * activated], dim=-1)
    return grad_gate_up.to(gate_up.dtype), (activated * up).to(gate_up.dtype)


def rotate_half(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@compiled_on_gpu
def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, tokens, q + k + v) -> queries and keys at their positions, values; each (batch, tokens, heads, width)."""
    num_heads, num_kv_heads = heads
    stacked = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, cos.shape[-1]))
    cos, sin = widen(cos)[:, :, None], widen(sin)[:, :, None]
    rotated = widen(stacked[:, :, : num_heads + num_kv_heads])
    rotated = (rotated * cos + rotate_half(rotated) * sin).to(qkv.dtype)
    query, key = rotated[:, :, :num_heads].contiguous(), rotated[:, :, num_heads:].contiguous()
    return query, key, stacked[:, :, num_heads + num_kv_heads :].contiguous()


@compiled_on_gpu
def split_and_rotate_backward(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of queries, keys and values -> gradient of the stacked (batch, tokens, q + k + v)."""
    rotated = widen(torch.cat([query, key], dim=2))
    cos, sin = widen(cos)[:, :, None], widen(sin)[:, :, None]
    unrotated = rotated * cos - rotate_half(rotated * sin)
    return torch.cat([unrotated.to(query.dtype), value], dim=2).flatten(2)


@compiled_on_gpu
def drop(tensor: Tensor, seed: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the rest; the mask is a hash of position and seed.

    So it needs no memory: the same seed gives the same mask in the backward pass. Hash: lowbias32 by C. Wellons.
    """
    low_32_bits = 0xFFFFFFFF
    mixed = torch.arange(tensor.numel(), device=tensor.device).view_as(tensor) * 0x9E3779B1 + seed
    mixed = mixed & low_32_bits
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & low_32_bits
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & low_32_bits
    mixed = mixed ^ (mixed >> 16)
    return torch.where(mixed >= int(probability * 2**32), tensor / (1 - probability), 0)


# The products.


class Projections:
    """LoRA layers of PEFT that read the same activation, as one product: y = [W_1; W_2; ...] x + s_i B_i A_i x.

    16-bit base weights are stacked in memory once, and the layers' own weights become views of the stack, so no byte
    is added; 4-bit weights are dequantised into one stack at each use. The adapters' dropout is drawn once for all
    layers of the stack, because they read the same activation: elements are dropped as often as PEFT drops them.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.adapter = layers[0].active_adapters[0]
        self.sizes = [layer.out_features for layer in layers]
        self.ranks = [layer.r[self.adapter] for layer in layers]
        self.scales = [layer.scaling[self.adapter] for layer in layers]
        self.dropout = getattr(layers[0].lora_dropout[self.adapter], "p", 0.0)
        self.stack: Tensor | None = None

    def in_use(self) -> bool:
        first = self.layers[0]
        return not first.disable_adapters and not first.merged and first.active_adapters == [self.adapter]

    def dropout_now(self) -> float:
        return self.dropout if self.layers[0].training else 0.0

    def adapters(self) -> list[Tensor]:
        """The fp32 parameters: every A (rank, in), then every B (out, rank)."""
        first = [layer.lora_A[self.adapter].weight for layer in self.layers]
        return first + [layer.lora_B[self.adapter].weight for layer in self.layers]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Stacked base weights, (sum of out, in)."""
        weights = [layer.get_base_layer().weight for layer in self.layers]
        if hasattr(weights[0], "quant_state"):
            shape = (sum(self.sizes), self.layers[0].in_features)
            stack = torch.empty(shape, dtype=weights[0].quant_state.dtype, device=weights[0].device)
            for weight, rows in zip(weights, stack.split(self.sizes), strict=True):
                if stack.is_cuda:
                    dequantize_4bit(weight.data, weight.quant_state, out=rows)
                else:  # bitsandbytes has no `out` there
                    rows.copy_(dequantize_4bit(weight.data, weight.quant_state))
            return stack.to(dtype)
        if len(weights) == 1:
            return weights[0].to(dtype)
        rows = None if self.stack is None else self.stack.split(self.sizes)
        if rows is None or any(w.data_ptr() != r.data_ptr() for w, r in zip(weights, rows, strict=True)):
            # First use, or somebody moved or replaced the weights.
            self.stack = torch.cat([weight.data for weight in weights])
            for weight, row in zip(weights, self.stack.split(self.sizes), strict=True):
                weight.data = row
        return self.stack.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight(x.dtype).T

    def transposed_product(self, grad: Tensor) -> Tensor:
        return grad @ self.weight(grad.dtype)

    def forward(self, x: Tensor, adapters: tuple[Tensor, ...], seed: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """y (tokens, sum of out) of x (tokens, in), and what the backward pass needs beside x."""
        number = len(self.layers)
        stacked_a = torch.cat([a.to(x.dtype) for a in adapters[:number]])
        scaled_b = [(b * s).to(x.dtype) for b, s in zip(adapters[number:], self.scales, strict=True)]
        x_a = (x if seed is None else drop(x, seed, self.dropout)) @ stacked_a.T
        y = self.product(x)
        for columns, low_rank, b in zip(y.split(self.sizes, 1), x_a.split(self.ranks, 1), scaled_b, strict=True):
            columns.addmm_(low_rank, b.T)
        return y, [x_a, stacked_a, *scaled_b]

    def backward(
        self, grad: Tensor, kept: list[Tensor], seed: Tensor | None, needs_grad: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Gradient of x (None when nothing below is trained), and of x_a."""
        x_a, stacked_a, *scaled_b = kept
        grad_a = torch.empty_like(x_a)
        for columns, low_rank, b in zip(grad.split(self.sizes, 1), grad_a.split(self.ranks, 1), scaled_b, strict=True):
            torch.mm(columns, b, out=low_rank)
        if not needs_grad:
            return None, grad_a
        grad_x = self.transposed_product(grad)
        if seed is None:
            return grad_x.addmm_(grad_a, stacked_a), grad_a
        return grad_x.add_(drop(grad_a @ stacked_a, seed, self.dropout)), grad_a

    def adapter_grads(
        self, x: Tensor, grad: Tensor, x_a: Tensor, grad_a: Tensor, seed: Tensor | None, dtype: torch.dtype
    ) -> list[Tensor]:
        """Gradients of `adapters()`, in their type."""
        dropped = x if seed is None else drop(x, seed, self.dropout)
        grads = list((grad_a.T @ dropped).to(dtype).split(self.ranks))
        for columns, low_rank, scale in zip(
            grad.split(self.sizes, 1), x_a.split(self.ranks, 1), self.scales, strict=True
        ):
            grads.append((columns.T @ low_rank).to(dtype) * scale)
        return grads


def draw_seed(projections: Projections, device: torch.device) -> Tensor | None:
    # Drawn from the device's generator, which checkpointing rewinds before it computes a layer again.
    return torch.randint(2**31, (1,), device=device) if projections.dropout_now() > 0 else None


class NormProject(torch.autograd.Function):
    """(hidden, adapters) -> hidden, projections of rms_norm(hidden).

    `hidden` is handed through, so that the gradient of the residual stream is added inside the norm's kernel.
    """

    @staticmethod
    def forward(ctx, hidden, projections, norm, dtype, *adapters):
        ctx.projections, ctx.dtype = projections, dtype
        # (weight, offset, epsilon); Gemma's norm multiplies by 1 + weight.
        is_gemma = isinstance(norm, GemmaRMSNorm)
        ctx.norm = (norm.weight, 1.0, norm.eps) if is_gemma else (norm.weight, 0.0, norm.variance_epsilon)
        ctx.seed = draw_seed(projections, hidden.device)
        y, kept = projections.forward(rms_norm(hidden, *ctx.norm, dtype), adapters, ctx.seed)
        ctx.save_for_backward(hidden, *kept)
        return hidden, y

    @staticmethod
    def backward(ctx, grad_residual, grad):
        hidden, *kept = ctx.saved_tensors
        grad_x, grad_a = ctx.projections.backward(grad, kept, ctx.seed, ctx.needs_input_grad[0])
        grad_hidden = None
        if grad_x is None:
            x = rms_norm(hidden, *ctx.norm, ctx.dtype)
        else:
            grad_hidden, x = rms_norm_backward(hidden, *ctx.norm, grad_x, grad_residual)
        grads = ctx.projections.adapter_grads(x, grad, kept[0], grad_a, ctx.seed, adapter_dtype(ctx.projections))
        return grad_hidden, None, None, None, *grads


class Project(torch.autograd.Function):
    """(x, residual or None, adapters) -> residual + projection of x."""

    @staticmethod
    def forward(ctx, x, residual, projections, *adapters):
        ctx.projections = projections
        ctx.seed = draw_seed(projections, x.device)
        y, kept = projections.forward(x, adapters, ctx.seed)
        ctx.save_for_backward(x, *kept)
        return y if residual is None else add_residual(y, residual)

    @staticmethod
    def backward(ctx, grad):
        x, *kept = ctx.saved_tensors
        narrow = grad.to(x.dtype)
        grad_x, grad_a = ctx.projections.backward(narrow, kept, ctx.seed, ctx.needs_input_grad[0])
        grads = ctx.projections.adapter_grads(x, narrow, kept[0], grad_a, ctx.seed, adapter_dtype(ctx.projections))
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, *grads


class ActivateProject(torch.autograd.Function):
    """(stacked [gate, up], residual, adapters) -> residual + projection of activation(gate) * up."""

    @staticmethod
    def forward(ctx, gate_up, residual, projections, is_gelu, *adapters):
        ctx.projections, ctx.is_gelu = projections, is_gelu
        ctx.seed = draw_seed(projections, gate_up.device)
        y, kept = projections.forward(gated_activation(gate_up, is_gelu), adapters, ctx.seed)
        ctx.save_for_backward(gate_up, *kept)
        return add_residual(y, residual)

    @staticmethod
    def backward(ctx, grad):
        gate_up, *kept = ctx.saved_tensors
        narrow = grad.to(gate_up.dtype)
        grad_x, grad_a = ctx.projections.backward(narrow, kept, ctx.seed, True)
        grad_gate_up, x = gated_activation_backward(gate_up, grad_x, ctx.is_gelu)
        grads = ctx.projections.adapter_grads(x, narrow, kept[0], grad_a, ctx.seed, adapter_dtype(ctx.projections))
        return grad_gate_up, grad, None, None, *grads


class SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads):
        ctx.save_for_backward(cos, sin)
        return split_and_rotate(qkv, cos, sin, heads)

    @staticmethod
    def backward(ctx, query, key, value):
        return split_and_rotate_backward(query, key, value, *ctx.saved_tensors), None, None, None


def add_residual(y: Tensor, residual: Tensor) -> Tensor:
    return y.add_(residual) if y.dtype == residual.dtype else y + residual


def adapter_dtype(projections: Projections) -> torch.dtype:
    return projections.layers[0].lora_A[projections.adapter].weight.dtype


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
        if past_key_values is not None or not self.fused_qkv.in_use():
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        device_type = hidden_states.device.type
        dtype = compute_dtype(self.fused_qkv, device_type)
        with torch.autocast(device_type, enabled=False):
            attention = self.self_attn
            batch, tokens, width = hidden_states.shape
            hidden, qkv = NormProject.apply(
                hidden_states.reshape(-1, width),
                self.fused_qkv,
                self.input_layernorm,
                dtype,
                *self.fused_qkv.adapters(),
            )
            cos, sin = position_embeddings
            num_kv_heads = self.fused_qkv.sizes[1] // attention.head_dim
            heads = (self.fused_qkv.sizes[0] // attention.head_dim, num_kv_heads)
            states = SplitAndRotate.apply(qkv.view(batch, tokens, -1), cos, sin, heads)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                attention.config._attn_implementation, eager_attention_forward
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
            hidden = Project.apply(attended, hidden, self.fused_o, *self.fused_o.adapters())
            hidden, gate_up = NormProject.apply(
                hidden, self.fused_gate_up, self.post_attention_layernorm, dtype, *self.fused_gate_up.adapters()
            )
            hidden = ActivateProject.apply(gate_up, hidden, self.fused_down, self.is_gelu, *self.fused_down.adapters())
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
        if args or kwargs or not self.fused.in_use():
            return super().forward(x, *args, **kwargs)
        dtype = compute_dtype(self.fused, x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            y = Project.apply(flat, None, self.fused, *self.fused.adapters())
            bias = self.get_base_layer().bias
            y = y if bias is None else y + bias.to(dtype)
        return y.view(*x.shape[:-1], -1)


def compute_dtype(projections: Projections, device_type: str) -> torch.dtype:
    """Type of the products: autocast's where it is on, else the base weights' (of 4-bit ones: what they unpack to)."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    weight = projections.layers[0].get_base_layer().weight
    return weight.quant_state.dtype if hasattr(weight, "quant_state") else weight.dtype


FUSED_LAYERS = {LlamaDecoderLayer: FusedLlamaDecoderLayer, GemmaDecoderLayer: FusedGemmaDecoderLayer}
IS_GELU = {SiLUActivation: False, nn.SiLU: False, GELUTanh: True}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fuse_lora(model: nn.Module) -> int:
    """Switch PEFT's LoRA layers of `model` to the fused computation, in place. Returns how many were switched.

    What is not plain LoRA with one adapter on a frozen linear layer (DoRA, 8 bit, biases in a decoder) keeps PEFT's
    own code. Adapter names, saving, loading, merging and disabling stay PEFT's. Generation with a cache runs PEFT's
    code too. Raises ValueError under DeepSpeed ZeRO-3, whose partitioned weights only a module's own call gathers.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("fused_lora does not work with ZeRO-3: set fused_lora: false, or use DDP or ZeRO-2")
    fused = 0
    decoders = [module for module in model.modules() if type(module) in FUSED_LAYERS]
    for index, layer in enumerate(decoders):
        by_name = {name.split(".")[-1]: child for name, child in layer.named_modules() if name.endswith("_proj")}
        projections = [by_name[name] for name in PROJECTIONS]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if not all(
            is_plain_lora(projection) and projection.get_base_layer().bias is None for projection in projections
        ):
            continue
        if any(norm.weight.requires_grad for norm in norms) or type(layer.mlp.act_fn) not in IS_GELU:
            continue
        query, key, value, output, gate, up, down = projections
        layer.fused_qkv, layer.fused_o = Projections([query, key, value]), Projections([output])
        layer.fused_gate_up, layer.fused_down = Projections([gate, up]), Projections([down])
        layer.is_gelu = IS_GELU[type(layer.mlp.act_fn)]
        layer.is_last = index == len(decoders) - 1
        layer.__class__ = FUSED_LAYERS[type(layer)]
        fused += len(projections)
    in_decoders = {
        id(module) for layer in decoders if isinstance(layer, FusedDecoderLayer) for module in layer.modules()
    }
    for module in model.modules():
        if type(module) is LoraLinear and id(module) not in in_decoders and is_plain_lora(module):
            module.fused = Projections([module])
            module.__class__ = FusedLoraLinear
            fused += 1
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
    )
