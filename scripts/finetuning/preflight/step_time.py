"""Seconds of a training step by part, without PyTorch: operations and bytes that a step needs, over what the chip does a second.

Products cost 2 operations a weight and token, forward; again for the gradient of their input; again for that of a trained
weight, and again for a forward pass that is repeated (arXiv 2205.05198, appendix A). What is not a product costs its bytes.
A part takes the longer of both, and the host's launches where they take longer still. `EFFICIENCY` was fitted to the
calibration half of `benchmarks/memory_grid.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetuning.preflight.planned_step import Batch, Training
from finetuning.preflight.step_memory import linear_weights

HOST_LINK = 25e9  # bytes a second from main memory to a GPU, over PCI Express
GPUS = Path(__file__).parents[2] / "gpus.yaml"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as `gpus.yaml` has it."""

    name: str
    title: str
    memory: float  # bytes that CUDA shows
    products: float  # operations a second, dense, 16 bits with sums in fp32
    bandwidth: float  # bytes a second
    link: float  # bytes a second to another GPU of the machine, in one direction
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """From Ampere on."""
        return self.capability >= (8, 0)


def has_8_bit_products(base_precision: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can do `base_precision`. FP8 needs 8.9.

    INT8 was measured on 9.0 alone: its kernel loads tiles by Hopper's copy engine, and 10.3 has few INT8 units.
    """
    return capability[0] == 9 if base_precision == "int8" else capability >= (8, 9)


@dataclass(frozen=True)
class Efficiency:
    """Shares of a datasheet's rates that a step reaches, and what the host takes to launch it, in seconds, on an H200's machine.

    Hosts of one kind of GPU differ by two.
    """

    products: float = 0.65
    eight_bits: float = 1.55  # times the rate of 16 bits, quantising included: frozen weights in INT8 or FP8
    attention: float = 0.35
    bandwidth: float = 0.63
    optimizer: float = 0.85  # of the bandwidth: a few large kernels
    step: float = 0.013
    tower: float = 0.019
    fused_layer: float = 0.0044  # forward and backward
    repeated_layer: float = 0.0021  # its forward pass once more
    dropout: float = 0.0019  # of a fused layer, for each forward pass
    plain_layer: float = 0.0055
    repeated_plain_layer: float = 0.005
    packed_layer: float = 0.0066  # more, of a plain layer over packed rows
    # The host launches beside the GPU's work: the longer of both counts, and a little more where they are close.
    norm: float = 4.0


EFFICIENCY = Efficiency()


def known_gpus() -> dict[str, Gpu]:
    """Name on the command line -> GPU."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(GPUS.read_text(encoding="utf-8"))["gpus"]
    return {
        name: Gpu(
            name=name,
            title=row["title"],
            memory=row["memory_gib"] * 2**30,
            products=row["tflops"] * 1e12,
            bandwidth=row["bandwidth_gb"] * 1e9,
            link=row["link_gb"] * 1e9,
            capability=tuple(row["capability"]),
        )
        for name, row in table.items()
    }


def gpu_named(name: str, memory: float) -> Gpu | None:
    """The kind of a GPU by the driver's name and bytes, with those bytes; None for one that the table lacks."""
    kinds = [gpu for gpu in known_gpus().values() if gpu.title.rsplit(" ", 2)[0] in name]
    # Of one name there may be two sizes, and one may be the start of another (L4, L40S).
    nearest = min(kinds, key=lambda gpu: (-len(gpu.title.split(" ")[0]), abs(gpu.memory - memory)), default=None)
    return None if nearest is None else replace(nearest, memory=memory)


def step_seconds(
    training: Training, batch: Batch, gpu: Gpu, accumulation: int = 1, host: float = 1.0
) -> dict[str, float]:
    """Seconds by part of a step of `accumulation` batches on each process; their sum is the step's time.

    `host`: how long the host takes to launch an operation, beside the one that `EFFICIENCY` is of.
    """
    parts = {
        "products": products_seconds(training, batch, gpu),
        "attention": attention_seconds(training, batch, gpu),
        "element-wise": elementwise_seconds(training, batch, gpu),
        "4-bit weights": unpacking_seconds(training, gpu),
        "16-bit copies": casts_seconds(training, gpu),
        "vision tower": tower_seconds(training, batch, gpu),
        "loss": loss_seconds(training, batch, gpu),
    }
    parts = {name: seconds * accumulation for name, seconds in parts.items()}
    parts["optimizer"] = optimizer_seconds(training, gpu)
    parts["communication"] = communication_seconds(training, gpu, accumulation)
    on_gpu, launches, norm = sum(parts.values()), host * host_seconds(training, accumulation), EFFICIENCY.norm
    parts["waiting for the host"] = (on_gpu**norm + launches**norm) ** (1 / norm) - on_gpu
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def passes(training: Training) -> tuple[float, float]:
    """How often a decoder layer's frozen weights are multiplied: (forward, its repetition included; backward), mean of the layers."""
    return 1 + training.checkpointed / training.shape.text.layers, 1.0


def products_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Linear layers of all decoder layers, with adapters or their own gradients."""
    text = training.shape.text
    forward, backward = passes(training)
    how = training.placement["language_model"]
    adapters = training.rank * sum(inner + outer for inner, outer in text.projections.values()) if how == "lora" else 0
    own = text.linear_parameters if how == "full" else adapters  # whose gradients are products too
    base = text.linear_parameters * (forward / speedup(training, "forward") + backward / speedup(training, "backward"))
    numbers = base + (forward + backward) * adapters + own
    fraction = 1 - skipped_share(training, batch)
    operations = 2 * batch.tokens * numbers * text.layers * fraction
    # Weights are read once a product, however few the tokens are.
    read = training.compute_bytes * text.linear_parameters * text.layers * (forward + backward)
    return max(operations / (gpu.products * EFFICIENCY.products), read / (gpu.bandwidth * EFFICIENCY.bandwidth))


def speedup(training: Training, which: str) -> float:
    """How much faster the `forward` or `backward` products with frozen weights are than in 16 bits."""
    in_8_bits = {"int8": ("forward", "backward"), "fp8_backward": ("backward",)}
    return EFFICIENCY.eight_bits if which in in_8_bits.get(training.base_precision or "", ()) else 1.0


def skipped_share(training: Training, batch: Batch) -> float:
    """Share of the linear layers' work that the last layer saves: after its attention it computes supervised rows only."""
    if not training.layers_are_fused or not batch.tokens:
        return 0.0
    text = training.shape.text
    after_attention = 1 - text.width * (text.query_width + 2 * text.kv_width) / text.linear_parameters
    return after_attention * (1 - batch.supervised / batch.tokens) / text.layers


def attention_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Causal attention: half of 4 operations a pair of tokens and width; 2.5 times that backward (arXiv 2307.08691)."""
    text = training.shape.text
    seen = (batch.longest or batch.length) / 2
    if batch.prefix:
        seen = batch.length / 2
    forward, backward = passes(training)
    operations = 4 * batch.tokens * seen * text.query_width * text.layers * (forward + 2.5 * backward)
    return operations / (gpu.products * EFFICIENCY.attention)


def elementwise_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Norms, rotary embedding, activation, residual sums: bytes read and written."""
    text = training.shape.text
    forward, backward = passes(training)
    states = text.query_width + 2 * text.kv_width
    if training.layers_are_fused:
        drops = 4 if training.dropout else 0
        once = 5 * text.width + 2 * states + 3 * text.mlp_width + drops * text.width
        again = 9 * text.width + 3 * states + 7 * text.mlp_width + drops * (text.width + text.mlp_width)
    else:
        once, again = (
            40 * text.width + 8 * states + 10 * text.mlp_width,
            50 * text.width + 12 * states + 16 * text.mlp_width,
        )
    numbers = batch.tokens * text.layers * (forward * once + backward * again)
    return numbers * training.compute_bytes / (gpu.bandwidth * EFFICIENCY.bandwidth)


def unpacking_seconds(training: Training, gpu: Gpu) -> float:
    """4-bit weights are unpacked at each use: half a byte and scales read, 16 bits written; 16 bits copied where sharded."""
    text = training.shape.text
    if training.bits is None:
        return 0.0
    forward, backward = passes(training)
    size = training.bits / 8 + 4 / 64 + training.compute_bytes
    numbers = text.layers * text.linear_parameters * (forward + backward)
    return numbers * size / (gpu.bandwidth * EFFICIENCY.bandwidth)


def tower_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Vision tower and projector, forward, and backward where they are trained."""
    vision = training.shape.vision
    if vision is None or not batch.pictures:
        return 0.0
    tokens = batch.pictures * vision.vectors
    weights = vision.read * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    operations = 2 * tokens * (weights + 2 * tokens / batch.pictures * vision.width * vision.read)
    bytes_ = tokens * vision.read * (14 * vision.width + 4 * vision.mlp_width) * training.compute_bytes
    if training.placement["vision_tower"] != "frozen":
        operations, bytes_ = 3 * operations, 3 * bytes_
    projector = 2 * batch.pictures * vision.tokens * sum(a * b for a, b in training.shape.projector_layers.values())
    operations += projector * (1 if training.placement["projector"] == "frozen" else 3)
    return operations / (gpu.products * EFFICIENCY.products) + bytes_ / (gpu.bandwidth * EFFICIENCY.bandwidth)


def loss_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Logits of supervised tokens, forward, again backward, and their gradient."""
    text = training.shape.text
    products = 4 if training.placement["language_model"] == "full" else 3
    operations = 2 * products * batch.supervised * text.vocabulary * text.width
    read = products * text.vocabulary * text.width * training.compute_bytes
    norms = 40 * batch.tokens * text.width
    busy = max(operations / (gpu.products * EFFICIENCY.products), read / (gpu.bandwidth * EFFICIENCY.bandwidth))
    return busy + norms / (gpu.bandwidth * EFFICIENCY.bandwidth)


def optimizer_seconds(training: Training, gpu: Gpu) -> float:
    """AdamW reads and writes weight and both moments, and reads the gradient."""
    share = 1 / training.strategy.num_processes if "optimizer" in training.strategy.shards else 1
    bytes_ = 16 if "8bit" in training.optimizer else 28
    return share * training.trained * bytes_ / (gpu.bandwidth * EFFICIENCY.optimizer)


def casts_seconds(training: Training, gpu: Gpu) -> float:
    """16-bit copies of fp32 weights at each forward pass, and their gradients back in fp32."""
    if training.placement["language_model"] != "full" or training.precision == "fp32":
        return 0.0
    forward, backward = passes(training)
    return training.trained * 6 * (forward + backward) / (gpu.bandwidth * EFFICIENCY.bandwidth)


def communication_seconds(training: Training, gpu: Gpu, accumulation: int) -> float:
    """What is not hidden beside products: gradients averaged over processes, sharded weights gathered at each pass."""
    strategy = training.strategy
    if strategy.is_one_process:
        return 0.0
    processes = strategy.num_processes
    size = 2 if strategy.is_deepspeed else 4
    sent = 2 * (processes - 1) / processes * size * training.trained
    if strategy.shards_weights:
        forward, backward = passes(training)
        weights = sum(training.shape.parameters.values()) * training.weight_bytes
        if training.shards_own_layers:
            weights = training.shape.text.layers * linear_weights(training)
        sent += (processes - 1) / processes * weights * (forward + backward) * accumulation
    seconds = sent / gpu.link
    if "weights" in strategy.offloads:  # from main memory and not from each other
        seconds += sum(training.shape.parameters.values()) * training.weight_bytes * sum(passes(training)) / HOST_LINK
    return seconds


def host_seconds(training: Training, accumulation: int) -> float:
    """What the host takes to launch a step's kernels."""
    layers, repeated = training.shape.text.layers, training.checkpointed
    if training.layers_are_fused:
        launches = layers * EFFICIENCY.fused_layer
        launches += (layers + repeated) * EFFICIENCY.dropout if training.dropout else 0
        launches += repeated * EFFICIENCY.repeated_layer
    else:
        launches = layers * (EFFICIENCY.plain_layer + (EFFICIENCY.packed_layer if training.packs_rows else 0))
        launches += repeated * EFFICIENCY.repeated_plain_layer
    tower = EFFICIENCY.tower if training.shape.vision is not None else 0
    return EFFICIENCY.step + accumulation * (launches + tower)
