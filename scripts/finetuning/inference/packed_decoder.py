"""A Llama, Mistral, Qwen2 or Gemma decoder without gradients, over flat tokens and a pool of keys and values.

The layers and their weights are transformers' own and PEFT's; what is computed is what `generate` computes. Here prompts
are not padded, a layer is four products with fused LoRA (`finetuning.kernels.lora_layers`), keys and values are written
where the next tokens read them, and the last layer computes only the tokens whose next one is asked for.
"""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn

from finetuning.families import FAMILIES
from finetuning.inference.packed_prompts import PackedPrompts, packed_attention
from finetuning.kernels.decode_attention import decode_attention, slots_of
from finetuning.kernels.dispatch import runs_triton
from finetuning.kernels.frozen_weights import Int8Weights
from finetuning.kernels.gated_mlp import gated_activation
from finetuning.kernels.int8_base import Int8Linear
from finetuning.kernels.lora_layers import (
    IS_GELU,
    PROJECTIONS,
    TWO_NORM_LAYERS,
    add_residual,
    fuse_lora,
    norm_arguments,
    projection_stacks,
    stacked_bias,
)
from finetuning.kernels.lora_projections import ProjectionStack, refresh_stacks
from finetuning.kernels.model_patches import vision_tower_without_autocast
from finetuning.kernels.rms_norm import rms_norm
from finetuning.kernels.rotary import launch_rotate, split_and_rotate
from finetuning.models.parts import base_model_of, frozen_tower_of, has_sliding_window

LAYER_CLASSES = (*TWO_NORM_LAYERS.keys(), *TWO_NORM_LAYERS.values())
# 4-bit products of so few rows are bitsandbytes' own, which read the packed weights; others unpack them first.
MOST_ROWS_OF_4BIT_PRODUCT = 32
# Rotary embeddings whose angles do not depend on the longest row of a batch.
FIXED_ROTARY = ("default", "linear", "llama3")


class Linears:
    """Linear layers that read the same activation, as one product where their weights can be stacked.

    Fused LoRA keeps its own stack. Plain frozen weights of one type are stacked here, and the layers' weights become
    views of the stack. All others (PEFT's own code, 4 bits without an adapter) are called one by one.
    """

    def __init__(self, modules: list[nn.Module], fused: ProjectionStack | None, dtype: torch.dtype):
        self.modules, self.fused, self.dtype = modules, fused, dtype
        self.is_4bit = fused is not None and hasattr(fused.layers[0].get_base_layer().weight, "quant_state")
        self.is_int8 = fused is not None and isinstance(fused.frozen, Int8Weights)
        self.bias = None if fused is None else stacked_bias(fused)
        self.stack = None
        plain = all(type(module) is nn.Linear and module.bias is None for module in modules)
        if fused is None and plain and not any(module.weight.requires_grad for module in modules):
            weights = [module.weight for module in modules]
            if {weight.dtype for weight in weights} == {dtype}:
                self.stack = weights[0].data if len(weights) == 1 else torch.cat([weight.data for weight in weights])
                for weight, rows in zip(weights, self.stack.split([len(weight) for weight in weights]), strict=True):
                    weight.data = rows

    @property
    def has_lora(self) -> bool:
        """Whether an adapter is there and switched on."""
        return self.fused is not None and self.fused.is_active

    def new_input(self, tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Memory for x (tokens, width), and the same with room for the low-rank columns where LoRA needs it."""
        if self.has_lora and not self.reads_4bit(tokens):
            return self.fused.allocate_input(tokens)
        return torch.empty(tokens, width, dtype=self.dtype, device=device), None

    def reads_4bit(self, tokens: int) -> bool:
        """Whether so few tokens are multiplied by 4-bit weights as they are stored."""
        return self.is_4bit and not self.fused.is_dora and tokens <= MOST_ROWS_OF_4BIT_PRODUCT

    def __call__(self, x: Tensor, wide: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, sum of out); `wide` is what `new_input` gave with x."""
        fused = self.fused
        if fused is None:
            if self.stack is not None:
                return torch.mm(x, self.stack.T)
            outputs = [module(x) for module in self.modules]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self.reads_4bit(len(x)):
            y = torch.cat([layer.get_base_layer()(x) for layer in fused.layers], dim=-1)
            return fused.add_low_rank(y, torch.mm(x, fused.a.T)) if fused.is_active else y
        if self.is_int8:
            y = fused.frozen.product(fused, x, torch.mm(x, fused.a.T) if fused.is_active else None)
        elif fused.is_active:
            y = torch.mm(self.extended(x, wide), fused.frozen.weight_and_b(fused).T)
            y = fused.scaled(y) if fused.is_dora else y
        else:
            y = torch.mm(x, fused.weight().T)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))

    def add_to(self, residual: Tensor, x: Tensor, wide: Tensor | None = None) -> Tensor:
        """residual (tokens, out) plus the product, in place where both are of one type: one pass over memory less."""
        one_product = not self.reads_4bit(len(x)) and (self.fused is not None or self.stack is not None)
        scales = self.has_lora and self.fused.is_dora
        if not one_product or residual.dtype != self.dtype or scales:
            return add_residual(self(x, wide), residual)
        if self.is_int8:
            x_a = torch.mm(x, self.fused.a.T) if self.has_lora else None
            return self.fused.frozen.product(self.fused, x, x_a, residual)
        if not self.has_lora:
            weight = self.stack if self.fused is None else self.fused.weight()
            return residual.addmm_(x, weight.T)
        return residual.addmm_(self.extended(x, wide), self.fused.frozen.weight_and_b(self.fused).T)

    def extended(self, x: Tensor, wide: Tensor | None) -> Tensor:
        """[x, s A x]; into `wide` the low-rank columns are written where they belong, which no training pass could."""
        if wide is None:
            return self.fused.concatenate_low_rank(x, torch.mm(x, self.fused.a.T))
        torch.mm(x, self.fused.a.T, out=wide[:, self.fused.in_features :])
        return wide


class Layer:
    """One decoder layer: its products, norms and attention."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        by_name = {name.split(".")[-1]: child for name, child in layer.named_modules() if name.endswith("_proj")}
        query, key, value, output, gate, up, down = (by_name[name] for name in PROJECTIONS)
        fused = projection_stacks(layer) if hasattr(layer, "fused_qkv") else [None] * 4
        groups = [[query, key, value], [output], [gate, up], [down]]
        self.qkv, self.output, self.gate_up, self.down = (
            Linears(modules, stack, dtype) for modules, stack in zip(groups, fused, strict=True)
        )
        self.norms = norm_arguments(layer.input_layernorm), norm_arguments(layer.post_attention_layernorm)
        self.is_gelu = IS_GELU[type(layer.mlp.act_fn)]
        self.heads = query.out_features // layer.self_attn.head_dim, key.out_features // layer.self_attn.head_dim
        self.attended_width, self.inner_width = output.in_features, down.in_features
        self.scale = layer.self_attn.scaling

    def attention_input(self, hidden: Tensor) -> Tensor:
        """(tokens, width) -> stacked queries, keys and values (tokens, q + k + v)."""
        x, wide = self.qkv.new_input(*hidden.shape, hidden.device)
        return self.qkv(rms_norm(hidden, *self.norms[0], x), wide)

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream and what was attended to (tokens, heads * width) -> the residual stream behind the layer."""
        hidden = self.output.add_to(hidden, attended)
        x, wide = self.gate_up.new_input(*hidden.shape, hidden.device)
        gate_up = self.gate_up(rms_norm(hidden, *self.norms[1], x), wide)
        x, wide = self.down.new_input(len(hidden), self.inner_width, hidden.device)
        return self.down.add_to(hidden, gated_activation(gate_up, self.is_gelu, x), wide)


class KeyValuePool:
    """Keys and values of all layers, (slots + 1, kv heads, width) each; the last slot belongs to no row."""

    def __init__(self, decoder: "PackedDecoder", slots: int):
        shape = (len(decoder.layers), 2, slots + 1, decoder.layers[0].heads[1], decoder.head_dim)
        self.slots = slots
        self.memory = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        # What is masked is multiplied by zero, so it must be finite; the kernel reads a row's own slots only.
        (self.memory[:, :, slots] if runs_triton(self.memory) else self.memory).zero_()

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, heads, width) of one layer."""
        keys, values = self.memory[number]
        return keys, values


class PackedDecoder:
    """The decoder of `model`; raises ValueError where `reason_against` gives one.

    A PeftModel that is not trained gets fused LoRA in place. Under `model.disable_adapter()` the base answers. Call
    `refresh` after every change of the adapters, `follow_switch` when they were switched on or off.
    """

    def __init__(self, model: nn.Module):
        if reason := reason_against(model):
            raise ValueError(reason)
        if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
            fuse_lora(model)
        tower = frozen_tower_of(model)
        if tower is not None and "forward" not in vars(tower):  # training has done so before
            vision_tower_without_autocast(model)
        self.model, self.base = model, base_model_of(model)
        self.text_model = getattr(self.base.model, "language_model", self.base.model)
        self.device = self.text_model.embed_tokens.weight.device
        self.dtype = compute_dtype(self.text_model.layers[0].self_attn.q_proj)
        self.layers = [Layer(layer, self.dtype) for layer in self.text_model.layers]
        self.head_dim = self.text_model.layers[0].self_attn.head_dim
        modules = model.modules()
        self.stacks = [value for module in modules for value in vars(module).values() if type(value) is ProjectionStack]

    def refresh(self) -> None:
        """Let the 16-bit copies of the adapters follow their fp32 masters."""
        if self.stacks:
            refresh_stacks(self.stacks)

    def follow_switch(self) -> None:
        """Compute with the adapters or without them, as they are switched now."""
        for stack in self.stacks:
            stack.follow_switch()

    def bytes_of_slot(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        return len(self.layers) * 2 * self.layers[0].heads[1] * self.head_dim * self.dtype.itemsize

    def bytes_of_token(self) -> int:
        """Memory that a token needs while a prompt is computed, beside its slot: about what a layer holds at once."""
        first = self.layers[0]
        width = self.text_model.config.hidden_size
        stacked = (first.heads[0] + 2 * first.heads[1]) * self.head_dim
        return self.dtype.itemsize * (8 * width + 2 * first.attended_width + stacked + 3 * first.inner_width)

    def prefill(
        self, hidden: Tensor, prompts: PackedPrompts, asked: Tensor, pool: KeyValuePool, first_slot: int
    ) -> Tensor:
        """Embeddings (tokens, width) -> last hidden states of the tokens `asked` (indices into the flat tokens).

        Keys and values of token i lie in slot `first_slot + i` afterwards.
        """
        slots = slice(first_slot, first_slot + len(hidden))

        def attend(number: int, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            key, value = (states[slots] for states in pool.layer(number))
            query = rotate_into(qkv, cos, sin, layer.heads, key, value)
            return packed_attention(prompts, query, key, value, layer.scale)

        return self.run_layers(hidden, prompts.positions, attend, asked)

    def decode(self, hidden: Tensor, positions: Tensor, runs: Tensor, slots: Tensor, pool: KeyValuePool) -> Tensor:
        """Embeddings of one token a row (rows, width) -> last hidden states; its keys and values go to `slots` (rows,)."""
        places = None if runs_triton(hidden) else slots_of(runs)

        def attend(number: int, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            query, key, value = (state[0] for state in split_and_rotate(qkv[None], cos, sin, layer.heads))
            keys, values = pool.layer(number)
            keys.index_copy_(0, slots, key)
            values.index_copy_(0, slots, value)
            return decode_attention(query, keys, values, runs, layer.scale, places)

        return self.run_layers(hidden, positions, attend)

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Callable, asked: Tensor | None = None) -> Tensor:
        """(tokens, width) through all layers and the last norm; with `asked` only these rows leave the last layer."""
        cos, sin = self.text_model.rotary_emb(hidden[None].to(self.dtype), position_ids=positions[None])
        for number, layer in enumerate(self.layers):
            attended = attend(number, layer, layer.attention_input(hidden), cos, sin).flatten(1)
            if asked is not None and number == len(self.layers) - 1:
                attended, hidden = attended[asked], hidden[asked]
            hidden = layer.after_attention(hidden, attended)
        return self.text_model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocabulary)."""
        return self.base.lm_head(hidden)


def rotate_into(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], key_out: Tensor, value_out: Tensor
) -> Tensor:
    """`split_and_rotate` of flat tokens, whose keys and values are written where they stay. Returns the queries."""
    if runs_triton(qkv):
        query = qkv.new_empty(1, len(qkv), heads[0], cos.shape[-1])
        launch_rotate(qkv, query, key_out[None], value_out[None], cos, sin, backward=False)
        return query[0]
    query, key, value = split_and_rotate(qkv[None], cos, sin, heads)
    key_out.copy_(key[0])
    value_out.copy_(value[0])
    return query[0]


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """The type of a linear layer's products: autocast's where it is on, else that of its weights."""
    base = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
    device_type = base.weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if isinstance(base, Int8Linear):
        return base.dtype
    state = getattr(base.weight, "quant_state", None)
    return base.weight.dtype if state is None else state.dtype


def reason_against(model: nn.Module) -> str | None:
    """Why `PackedDecoder` cannot run this model, in words; None where it can."""
    base = base_model_of(model)
    text_model = getattr(getattr(base, "model", None), "language_model", getattr(base, "model", None))
    layers = getattr(text_model, "layers", [])
    if not len(layers) or any(type(layer) not in LAYER_CLASSES for layer in layers):
        return f"{type(base).__name__} has no Llama, Mistral, Qwen2 or Gemma decoder"
    if text_model is not base.model and base.config.model_type not in FAMILIES:
        return f"pictures of {base.config.model_type} are not known here"
    config = base.config.get_text_config()
    if has_sliding_window(config):
        return "its layers see only so many tokens back"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in FIXED_ROTARY:
        return f"its rotary embedding ({kind}) depends on the length of the row"
    if any(type(layer.mlp.act_fn) not in IS_GELU for layer in layers):
        return f"its activation is {type(layers[0].mlp.act_fn).__name__}"
    generation = base.generation_config
    changed = [
        name
        for name, neutral in NEUTRAL_GENERATION.items()
        if getattr(generation, name, None) not in (None, neutral, [])
    ]
    return f"its generation_config sets {', '.join(changed)}" if changed else None


# Settings of greedy generation that would change its answers.
NEUTRAL_GENERATION = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
}
