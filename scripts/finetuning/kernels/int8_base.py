"""`base_precision: int8`: forward products with the frozen weights of the decoder layers run in INT8.

Weights and activations have 8 bits and one scale a row, after a rotation (`int8.py`). The low-rank part stays in 16 bits,
and the sum is rounded once. Gradients pass in FP8 (`fp8_backward.py`), whose products are faster still, through the
weights as the forward product reads them.
"""

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetuning.kernels.int8 import ROTATED, dequantize_rows, int8_linear, quantize_rows_to_int8
from finetuning.models.parts import decoder_layers
from finetuning.run_folder import read_int8_products

try:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
except ImportError:
    dequantize_4bit = Linear4bit = None

# Projection -> the product that it is part of, as `lora_layers.projection_stacks` has them
STACK_OF = {name: "qkv" for name in ("q_proj", "k_proj", "v_proj")}
STACK_OF |= {"o_proj": "o", "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


class Int8Linear(nn.Linear):
    """A frozen linear layer; `weight` (out, in) is INT8 and rotated, `scale` (out,) is fp32.

    Its inputs and outputs have `dtype`, that of the weights before.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        values, scale = quantize_rows_to_int8(weight)
        self.weight = nn.Parameter(values, requires_grad=False)
        # As integers: `model.bfloat16()`, as DeepSpeed calls it, would round them.
        self.register_buffer("scale_bits", scale.view(torch.int32), persistent=False)
        self.bias, self.dtype = bias, weight.dtype

    @property
    def scale(self) -> Tensor:
        """One factor for each row of `weight`, (out,) in fp32."""
        return self.scale_bits.view(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). Where a gradient is asked for, x is not quantised."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, dequantize_rows(self.weight, self.scale, x.dtype), self.bias)
        flat = x.reshape(-1, self.in_features)
        out = x.new_empty(len(flat), self.out_features)
        int8_linear(quantize_rows_to_int8(flat), (self.weight, self.scale), out)
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], -1)


@torch.no_grad()
def hold_base_in_int8(model: nn.Module, keep: Collection[str] = ()) -> int:
    """Quantise the frozen linear layers of `model`'s decoder, 16-bit or 4-bit ones, in place. Returns how many.

    Before `fuse_lora`, with PEFT's layers around them or without. `keep`: names as `stack_name` gives them, which stay as
    they are. One layer after the other, so that no more than one is there twice.
    """
    held = 0
    for number, layer in enumerate(decoder_layers(model)):
        for parent, name, linear, projection in frozen_linears(layer):
            if stack_name(number, projection) not in keep:
                setattr(parent, name, int8_linear_of(linear))
                held += 1
    return held


def frozen_linears(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module, str]]:
    """(parent, name in it, the linear layer, its projection) of a decoder layer's projections, PEFT's wrapping left out."""
    found = []
    for path, parent in layer.named_modules():
        for name, child in parent.named_children():
            projection = path.rpartition(".")[2] if name == "base_layer" else name
            if projection in STACK_OF and type(child) in (nn.Linear, Linear4bit):
                found.append((parent, name, child, projection))
    return found


def stack_name(layer: int, projection: str) -> str:
    """The name of a projection's stack, as `3.down`: its layer, and which product it is part of."""
    return f"{layer}.{STACK_OF[projection]}"


def int8_linear_of(linear: nn.Linear) -> Int8Linear:
    """The same layer in INT8."""
    weight, state = linear.weight.data, getattr(linear.weight, "quant_state", None)
    return Int8Linear(weight if state is None else dequantize_4bit(weight, state), linear.bias)


def set_base_precision(model: nn.Module, base_precision: str | None, run: Path) -> None:
    """Let a model that is asked, not trained, multiply in INT8 if that is given. Raises ValueError where it cannot.

    `run` is what was loaded: a run's folder may say which products stay in 16 bits.
    """
    if base_precision == "int8":
        refuse_base_precision(base_precision, next(model.parameters()).device)
        refuse_int8_layers(model)
        hold_base_in_int8(model, (read_int8_products(run) or {}).get("in_16_bits", ()))


def refuse_base_precision(base_precision: str | None, device: torch.device | None = None) -> None:
    """Raise ValueError where `device` has no INT8 kernel; None is where a model would be loaded to, before it is."""
    if base_precision is None:
        return
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    if major != 9:
        where = f"{torch.cuda.get_device_name(device)}, of {major}.{minor}" if on_gpu else "the CPU"
        raise ValueError(
            f"base_precision: {base_precision} was made for GPUs of compute capability 9.0 (H100, H200), and this is "
            f"{where}: leave it out"
        )


def refuse_int8_layers(model: nn.Module) -> None:
    """Raise ValueError where adapters or layers of `model`'s decoder have sizes that the INT8 product cannot have."""
    linears = [linear for layer in decoder_layers(model) for *_, linear, _ in frozen_linears(layer)]
    ranks = {rank for module in model.modules() if hasattr(module, "lora_A") for rank in module.r.values() if rank % 8}
    if ranks:
        raise ValueError(
            f"base_precision: int8 needs adapters of rank 8 and multiples, not {sorted(ranks)}: leave it out"
        )
    uneven = sorted(
        {width for linear in linears for width in (linear.in_features, linear.out_features) if width % ROTATED}
    )
    if uneven:
        raise ValueError(f"base_precision: int8 needs layers of width 128 and multiples, not {uneven}: leave it out")
