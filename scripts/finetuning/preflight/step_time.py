"""Seconds of a training step by part, without PyTorch: operations and bytes that a step needs, over what the chip does a second.

Products cost 2 operations a weight and token, forward; again for the gradient of their input; again for that of a trained
weight, and again for a forward pass that is repeated (arXiv 2205.05198, appendix A). What is not a product costs its bytes.
A part takes the longer of both, and the host's launches where they take longer still. `EFFICIENCY` was fitted to the
calibration half of `benchmarks/memory_grid.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetuning.preflight.planned_step import Batch, Training
from finetuning.preflight.step_memory import VOCABULARY_CHUNK

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


@dataclass(frozen=True)
class Efficiency:
    """Shares of a chip's rates that a step reaches, and the host's part, measured on an H200."""

    products: float = 0.72  # large products, of the datasheet's rate
    attention: float = 0.35
    bandwidth: float = 0.75
    product_latency: float = 6e-6  # seconds that a product takes however small it is
    launch: float = 7e-6  # seconds of the host for a kernel


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


def step_seconds(training: Training, batch: Batch, gpu: Gpu, accumulation: int = 1) -> dict[str, float]:
    """Seconds by part of a step of `accumulation` batches on each process; their sum is the step's time."""
    parts = {
        "products": products_seconds(training, batch, gpu),
        "attention": attention_seconds(training, batch, gpu),
        "element-wise": elementwise_seconds(training, batch, gpu),
        "4-bit weights": unpacking_seconds(training, gpu),
        "vision tower": tower_seconds(training, batch, gpu),
        "loss": loss_seconds(training, batch, gpu),
    }
    parts = {name: seconds * accumulation for name, seconds in parts.items()}
    parts["optimizer"] = optimizer_seconds(training, gpu)
    parts["communication"] = communication_seconds(training, gpu, accumulation)
    on_gpu = sum(parts.values())
    parts["waiting for the host"] = max(host_seconds(training, accumulation) - on_gpu, 0.0)
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
    numbers = (forward + backward) * (text.linear_parameters + adapters) + own
    fraction = 1 - skipped_share(training, batch)
    operations = 2 * batch.tokens * numbers * text.layers * fraction
    # Weights are read once a product, however few the tokens are.
    read = training.compute_bytes * text.linear_parameters * text.layers * (forward + backward)
    count = text.layers * (forward * 8 + backward * 16 if training.layers_are_fused else forward * 21 + backward * 42)
    busy = max(operations / (gpu.products * EFFICIENCY.products), read / (gpu.bandwidth * EFFICIENCY.bandwidth))
    return busy + count * EFFICIENCY.product_latency


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
    tokens = batch.pictures * (vision.patches + 1)
    weights = vision.read * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    operations = 2 * tokens * (weights + 2 * tokens / batch.pictures * vision.width * vision.read)
    bytes_ = tokens * vision.read * (14 * vision.width + 4 * vision.mlp_width) * training.compute_bytes
    if training.placement["vision_tower"] != "frozen":
        operations, bytes_ = 3 * operations, 3 * bytes_
    projector = 2 * batch.pictures * vision.tokens * sum(a * b for a, b in training.shape.projector_layers.values())
    operations += projector * (1 if training.placement["projector"] == "frozen" else 3)
    latency = vision.read * 6 * EFFICIENCY.product_latency
    return operations / (gpu.products * EFFICIENCY.products) + bytes_ / (gpu.bandwidth * EFFICIENCY.bandwidth) + latency


def loss_seconds(training: Training, batch: Batch, gpu: Gpu) -> float:
    """Logits of supervised tokens, forward, again backward, and their gradient."""
    text = training.shape.text
    products = 4 if training.placement["language_model"] == "full" else 3
    operations = 2 * products * batch.supervised * text.vocabulary * text.width
    read = products * text.vocabulary * text.width * training.compute_bytes
    norms = 40 * batch.tokens * text.width
    tiles = -(-text.vocabulary // VOCABULARY_CHUNK)
    busy = max(operations / (gpu.products * EFFICIENCY.products), read / (gpu.bandwidth * EFFICIENCY.bandwidth))
    return busy + norms / (gpu.bandwidth * EFFICIENCY.bandwidth) + 5 * tiles * EFFICIENCY.product_latency


def optimizer_seconds(training: Training, gpu: Gpu) -> float:
    """AdamW reads and writes weight and both moments, reads the gradient, which is clipped before."""
    share = 1 / training.strategy.num_processes if "optimizer" in training.strategy.shards else 1
    bytes_ = 16 if "8bit" in training.optimizer else 28
    return share * training.trained * (bytes_ + 12) / (gpu.bandwidth * EFFICIENCY.bandwidth)


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
        sent += (processes - 1) / processes * weights * (forward + backward) * accumulation
    return sent / gpu.link


def host_seconds(training: Training, accumulation: int) -> float:
    """Kernels that the host launches, one after the other."""
    text, vision = training.shape.text, training.shape.vision
    forward, backward = passes(training)
    a_layer = (forward * 30 + backward * 60) if training.layers_are_fused else (forward * 90 + backward * 180)
    tower = vision.read * 20 if vision is not None else 0
    return (accumulation * (text.layers * a_layer + tower + 300) + 200) * EFFICIENCY.launch
