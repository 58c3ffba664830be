"""One process's share of a training step, as a plan knows it: what is trained and how, and the batch. No PyTorch."""

from dataclasses import dataclass, field, replace

from finetuning.model_shape import ModelShape
from finetuning.strategy import Strategy

OFF = 0.10  # a run that differs by more from its plan says so


@dataclass(frozen=True)
class Training:
    """What is trained, how it is held, and how one process of it runs."""

    shape: ModelShape
    placement: dict[str, str]  # part -> frozen, lora or full
    rank: int = 8
    targets: tuple[str, ...] | None = None  # last names of the layers with LoRA; None: all
    dropout: float = 0.0
    bits: int | None = None  # 4 or 8
    nested: bool = False  # scales of 4-bit weights quantised too
    base_precision: str | None = None  # fp8_backward or int8
    precision: str = "bf16"  # bf16, fp16 or fp32
    weight_bytes: int = 2  # of the frozen weights
    optimizer: str = "adamw_torch_fused"
    strategy: Strategy = field(default_factory=lambda: Strategy("one process"))
    checkpointed: int = 0  # decoder layers, the first ones
    offloads_inputs: bool = False  # of recomputed layers, to main memory: `activation_offloading`
    fused: bool = True  # `fused_lora`
    dora: bool = False  # `use_dora`
    shares_prefix: bool = False
    packs_rows: bool = False  # rows side by side in one sequence
    accumulates: bool = False  # gradients of several batches are added before a step

    def __post_init__(self) -> None:
        ours = replace(self.strategy, shards_layers_only=self.shards_own_layers)
        object.__setattr__(self, "strategy", ours)  # as `distributed.layers_only` leaves it

    @property
    def is_lora(self) -> bool:
        """Whether any part has adapters."""
        return "lora" in self.placement.values()

    @property
    def layers_are_fused(self) -> bool:
        """Whether the decoder layers run as `kernels/lora_layers.py`."""
        known = self.fused and self.placement["language_model"] == "lora" and self.targets is None and self.bits != 8
        known = known and not (self.dora and self.dropout)
        # Biases and further norms would have to be gathered too.
        return known and not (self.strategy.shards_weights and self.shape.text.kind in ("qwen2", "gemma3_text"))

    @property
    def shards_own_layers(self) -> bool:
        """ZeRO-3 and FSDP2 of fused layers: `distributed.sharded_layers`, and all else whole on every process."""
        return self.layers_are_fused and self.strategy.shards_weights and not self.strategy.offloads

    @property
    def shards(self) -> tuple[str, ...]:
        """What each process holds a share of only."""
        return self.strategy.shards

    @property
    def holds_gradients(self) -> bool:
        """Whether memory of all gradients is there from step to step: in buckets, or as they wait for more rows."""
        return self.accumulates or not (self.strategy.is_one_process or self.shards_own_layers)

    @property
    def joins_weights(self) -> bool:
        """Whether W lies beside B and s A in memory, so that no product copies it."""
        whole = self.strategy.replicates or self.shards_own_layers or not self.strategy.shards_weights
        is_16_bit = self.bits is None and self.base_precision != "int8" and self.compute_bytes == self.weight_bytes
        return self.layers_are_fused and is_16_bit and whole

    @property
    def compute_bytes(self) -> int:
        """Of a number in a product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def residual_bytes(self) -> int:
        """Of a number in the residual stream: fp32 of a Gemma in fp16, and where all weights are fp32."""
        is_wide = self.weight_bytes == 4 or (self.shape.text.kind.startswith("gemma") and self.precision == "fp16")
        return 4 if is_wide else 2

    @property
    def adapters(self) -> int:
        """Numbers of all LoRA matrices: rank (in + out) for each adapted layer; of DoRA a magnitude for each output too."""
        return sum(
            self.rank * (inner + outer) + self.dora * outer
            for part, layers in self.shape.lora_layers.items()
            if self.placement[part] == "lora"
            for name, inner, outer in layers
            if self.targets is None or name in self.targets
        )

    @property
    def trained_in_full(self) -> int:
        """Numbers of the parts that are trained in full."""
        sizes = dict(self.shape.parameters)
        if self.shape.vision is not None:
            sizes["vision_tower"] = self.shape.vision.trainable_parameters
        return sum(sizes[part] for part, how in self.placement.items() if how == "full")

    @property
    def trained(self) -> int:
        """Numbers that get a gradient."""
        return self.adapters + self.trained_in_full


@dataclass(frozen=True)
class Batch:
    """The longest batch that one process computes at once, in rows, tokens and pictures."""

    rows: int
    length: int  # of a row, with its padding
    supervised: int  # tokens, of all rows
    pictures: int = 0
    longest: int = 0  # dialogue of a sequence of packed rows; 0: the length
    prefix: int = 0  # tokens that the dialogues of a sequence share

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.rows * self.length


def beside_plan(planned: dict[str, float], measured: dict[str, float]) -> str:
    """One sentence on `seconds_per_step` and `peak_memory_gib`, as far as they are measured; more than 10 % off is said."""
    parts, is_off = [], False
    for name, unit in {"seconds_per_step": "s a step", "peak_memory_gib": "GiB"}.items():
        if name in measured:
            share = measured[name] / planned[name] - 1
            is_off |= abs(share) > OFF
            parts.append(f"{planned[name]:.2f} {unit}, measured {measured[name]:.2f} ({share:+.0%})")
        else:
            parts.append(f"{planned[name]:.2f} {unit}")
    return f"planned: {'; '.join(parts)}" + (f": more than {OFF:.0%} off" if is_off else "")
