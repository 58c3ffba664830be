"""Peak memory of a training step, by part, without PyTorch: what is allocated is added up in the order in which a step does it.

Weights, adapters, gradients and the optimizer's state are counted exactly (ZeRO, arXiv 1910.02054, section 3, says what a
strategy shards). Activations follow from what each autograd function keeps and allocates (`kernels/lora_layers.py`; for
layers without LoRA transformers' own code under autocast), in the manner of arXiv 2205.05198, section 4. What neither
says, kernels' workspaces and the CUDA context, was measured: `CALIBRATED`, from the calibration half of
`benchmarks/memory_grid.py`.
"""

from dataclasses import dataclass, replace

from finetuning.preflight.layer_memory import FusedLayer, Layer, Ledger, PlainLayer
from finetuning.preflight.planned_step import Batch, Training

GIB = 2**30
VOCABULARY_CHUNK, TOKEN_CHUNK = 32768, 4096  # of TRL's fused loss: logits of so many words and tokens at a time


@dataclass(frozen=True)
class Calibrated:
    """Bytes that no formula gives, measured on an H200 with torch 2.11."""

    workspace: int = 64 * 2**20  # of cuBLAS
    context: int = 770 * 2**20  # CUDA context and the code of kernels; not of PyTorch's allocator
    deepspeed: float = (
        4  # for each trained number of LoRA: flat copies of weights and gradients (two H200s, one setting)
    )
    slack: float = 0.02  # of the peak: what the caching allocator cannot give back of its blocks


CALIBRATED = Calibrated()


def peak_memory(training: Training, batch: Batch) -> dict[str, float]:
    """Bytes by part at the highest moment of a step, of one process. The sum is what PyTorch has allocated."""
    ledger = Ledger()
    for part, size in standing_memory(training).items():
        ledger.add(part, size)
    ledger.add("workspace", CALIBRATED.workspace)
    pixels = training.shape.vision.image_size**2 * training.shape.vision.channels if training.shape.vision else 0
    ledger.add("batch", 4 * batch.pictures * pixels + 3 * 8 * batch.tokens)
    layers = layers_of(training, batch)
    forward(training, batch, layers, ledger)
    loss_and_final_norm(training, batch, ledger)
    backward(training, batch, layers, ledger)
    return {part: size for part, size in ledger.at_peak.items() if size > 0}


def process_memory(training: Training, batch: Batch) -> dict[str, float]:
    """What the driver sees of one process: `peak_memory`, what the allocator holds beside it, and the CUDA context."""
    needs = peak_memory(training, batch)
    return needs | {
        "allocator": CALIBRATED.slack * sum(needs.values()),
        "context": CALIBRATED.context,
    }


def fewest_checkpointed(training: Training, batch: Batch, budget: float) -> int | None:
    """What `checkpoint_layers: auto` will choose where `budget` bytes are free: the fewest layers that fit; None: not even all."""
    counts = range(training.shape.text.layers + 1)
    needs = (sum(process_memory(replace(training, checkpointed=count), batch).values()) for count in counts)
    return next((count for count, need in zip(counts, needs, strict=True) if need <= budget), None)


def standing_memory(training: Training) -> dict[str, float]:
    """Bytes by part that are there from the first step's end on, whatever the batch."""
    strategy = training.strategy
    deepspeed = strategy.is_deepspeed
    adapters = (2 if deepspeed else 4) * training.adapters
    fully = strategy.is_fsdp and "optimizer" in training.shards
    needs = {
        "weights": weights_memory(training),
        "gathered layers": gathered_memory(training),
        "adapters": adapters / (strategy.num_processes if fully else 1) + adapter_copies(training),
        "optimizer": optimizer_memory(training),
        "gradients": 0.0,
    }
    if training.holds_gradients:  # buckets, flat buffers, shards; or waiting for more rows
        needs["gradients"] = float((2 if deepspeed else 4) * training.trained)
    share = {what: 1 / strategy.num_processes for what in training.shards}
    for what in ("optimizer", "gradients"):
        needs[what] *= share.get(what, 1)
        needs[what] *= 0 if "optimizer" in strategy.offloads else 1
    if deepspeed and training.is_lora:
        needs["gradients"] += CALIBRATED.deepspeed * training.trained
    return needs


def weights_memory(training: Training) -> float:
    """Bytes of all base weights, parts trained in full among them."""
    shape, width = training.shape, training.weight_bytes
    text = shape.text
    layers = text.layers * (linear_weights(training) + text.other_parameters * width)
    rest = text.head_parameters + text.width
    sizes = {"language_model": layers + rest * width}
    sizes |= {part: size * width for part, size in shape.parameters.items() if part != "language_model"}
    for part, how in training.placement.items():
        if how == "full":
            trained = shape.parameters[part] * (2 if training.strategy.is_deepspeed else 4)
            # PEFT keeps the frozen original of what it trains beside adapters.
            sizes[part] = trained + (sizes[part] if training.is_lora else 0)
    if not training.strategy.shards_weights:
        return float(sum(sizes.values()))
    if "weights" in training.strategy.offloads:
        return 0.0
    whole = sum(sizes.values()) - layers if training.shards_own_layers else 0.0
    return whole + (sum(sizes.values()) - whole) / training.strategy.num_processes


def gathered_memory(training: Training) -> float:
    """Bytes of what a strategy that shards the weights has whole for the moment: two decoder layers; DeepSpeed's own more."""
    if not training.strategy.shards_weights:
        return 0.0
    layer = linear_weights(training)
    if not training.strategy.is_deepspeed:
        return 2 * layer
    vision = training.shape.vision.parameters if training.shape.vision is not None else 0
    return 4 * layer + training.weight_bytes * (vision + training.shape.text.head_parameters)


def linear_weights(training: Training) -> float:
    """Bytes of one decoder layer's linear weights; fused layers keep room for LoRA beside them."""
    numbers = training.shape.text.linear_parameters
    if training.bits == 4:
        # A scale for 64 numbers: fp32, or one byte with an fp32 scale of its own for 256 (arXiv 2305.14314).
        return numbers / 2 + numbers / 64 * ((1 + 4 / 256) if training.nested else 4)
    if training.bits == 8:
        return numbers + 4 * sum(outer for _, outer in training.shape.text.projections.values())
    if training.base_precision == "int8":
        return 2 * numbers  # in INT8, and in FP8 for gradients
    for_gradients = numbers if training.base_precision == "fp8_backward" else 0
    if not training.joins_weights:
        return numbers * training.weight_bytes + for_gradients
    joined = sum(stack.joined for stack in FusedLayer(training, Batch(1, 1, 1), 0).stacks)
    return joined * training.weight_bytes + for_gradients


def adapter_copies(training: Training) -> float:
    """Bytes of the adapters in the type of the products, as the fused layers keep them."""
    if not training.layers_are_fused:
        return 0.0
    stacks = FusedLayer(training, Batch(1, 1, 1), 0).stacks
    copies = sum(stack.rank * stack.inner for stack in stacks)
    if not training.joins_weights:
        is_whole = training.dora or training.base_precision == "int8"  # with the zeros beside each layer's B
        copies += sum(stack.rank * stack.outer // (1 if is_whole else stack.alike) for stack in stacks)
    return training.shape.text.layers * copies * training.compute_bytes


def optimizer_memory(training: Training) -> float:
    """Bytes of Adam's two numbers for each trained one, and of DeepSpeed's fp32 master."""
    name = training.optimizer
    if name.startswith("paged"):
        size = 0.0  # pages that may lie in main memory
    elif not name.startswith("adamw"):
        size = 0.0
    elif "8bit" in name:
        size = 2 + 2 * 4 / 256  # a scale for 256 numbers
    else:
        size = next((bytes_ for kind, bytes_ in {"4bit": 1.0, "anyprecision": 4.0}.items() if kind in name), 8.0)
    needs = training.trained * (size + (4 if training.strategy.is_deepspeed else 0))
    if "8bit" in name and not name.startswith("paged") and training.placement["language_model"] == "full":
        # The Trainer has bitsandbytes keep an embedding's state in 32 bits.
        needs += training.shape.text.vocabulary * training.shape.text.width * (8 - size)
    return needs


def layers_of(training: Training, batch: Batch) -> list[Layer]:
    """The decoder layers, first to last."""
    kind = FusedLayer if training.layers_are_fused else PlainLayer
    return [kind(training, batch, index) for index in range(training.shape.text.layers)]


def forward(training: Training, batch: Batch, layers: list[Layer], ledger: Ledger) -> None:
    """Vision tower, projector, decoder layers."""
    text, vision = training.shape.text, training.shape.vision
    size = training.compute_bytes
    embedded = batch.tokens * text.width * training.residual_bytes
    if vision is not None and batch.pictures:
        patches, outputs = batch.pictures * vision.vectors, batch.pictures * vision.tokens
        block = 3 * vision.width + 2 * vision.mlp_width
        with ledger.during("vision tower", patches * vision.width * size, patches * block * size):
            pass
        projected = outputs * text.width * size
        ledger.add("activations", projector_memory(training, batch) + tower_memory(training, batch))
        with ledger.during("vision tower", projected, projected, projected, embedded):
            pass
        ledger.add("vision tower", 2 * projected + patches * vision.width * size)  # until the language model is through
    ledger.add("activations", embedded)
    ledger.add("16-bit copies", cast_weights(training))
    for layer in layers:
        layer.forward(ledger, keeps=layer.index >= training.checkpointed)
    ledger.add("vision tower", -ledger.live["vision tower"])


def cast_weights(training: Training) -> float:
    """Bytes of the 16-bit copies that autocast makes of fp32 weights; each lives until its layer's backward pass."""
    shape = training.shape
    if training.weight_bytes == 2 or training.precision == "fp32" or training.placement["language_model"] != "full":
        return 0.0
    numbers = shape.text.layers * shape.text.linear_parameters
    if shape.vision is not None:
        numbers += sum(inner * outer for inner, outer in shape.projector_layers.values())
        numbers += shape.vision.parameters if training.placement["vision_tower"] == "full" else 0
    return 2.0 * numbers


def projector_memory(training: Training, batch: Batch) -> float:
    """Bytes that a trained projector keeps: the inputs of its layers and of its activation."""
    vision, size = training.shape.vision, training.compute_bytes
    if vision is None or (
        training.placement["projector"] == "frozen" and training.placement["vision_tower"] == "frozen"
    ):
        return 0.0
    return batch.pictures * vision.tokens * size * (vision.width + 3 * training.shape.text.width)


def tower_memory(training: Training, batch: Batch) -> float:
    """Bytes that a trained vision tower keeps: transformers' blocks under autocast, norms in fp32."""
    vision = training.shape.vision
    if vision is None or training.placement["vision_tower"] == "frozen":
        return 0.0
    of_token = 2 * (3 + 4 + 1) * vision.width + 2 * (4 + 4) * vision.width + 3 * 2 * vision.mlp_width
    return batch.pictures * vision.vectors * vision.read * of_token


def loss_and_final_norm(training: Training, batch: Batch, ledger: Ledger) -> None:
    """The fused loss on supervised tokens, forward and backward, and the final norm, which runs on all tokens in fp32."""
    text, size = training.shape.text, training.compute_bytes
    hidden = batch.tokens * text.width
    tile = min(batch.supervised, TOKEN_CHUNK) * VOCABULARY_CHUNK * size
    if training.residual_bytes == 2:
        ledger.add("loss", 4 * hidden)  # kept for the norm's backward pass
    with ledger.during("loss", 8 * hidden, size * hidden):
        pass
    with ledger.during("loss", size * hidden, tile, batch.supervised * text.width * size):
        pass
    head = 4 * text.vocabulary * text.width if training.placement["language_model"] == "full" else 0
    with ledger.during("loss", tile, batch.supervised * text.width * (4 + size)):
        add_gradients(training, ledger, text.vocabulary * text.width if head else 0)
    with ledger.during("loss", 2 * size * hidden, 16 * hidden):
        pass
    if training.residual_bytes == 2:
        ledger.add("loss", -4 * hidden)


def add_gradients(training: Training, ledger: Ledger, numbers: int) -> None:
    """fp32 gradients that a backward pass makes, where they are not held from step to step."""
    if not training.holds_gradients:
        ledger.add("gradients", 4 * numbers)


def backward(training: Training, batch: Batch, layers: list[Layer], ledger: Ledger) -> None:
    """Decoder layers in reverse; what a layer kept is freed and its gradients are there."""
    text = training.shape.text
    trained_a_layer = gradients_a_layer(training)
    casts = cast_weights(training) > 0
    ledger.add("working memory", batch.tokens * text.width * training.residual_bytes)
    for layer in reversed(layers):
        layer.backward(ledger, kept=layer.index >= training.checkpointed)
        add_gradients(training, ledger, trained_a_layer)
        if casts:
            ledger.add("16-bit copies", -2 * text.linear_parameters)
    others = training.trained - text.layers * trained_a_layer
    others -= text.vocabulary * text.width if training.placement["language_model"] == "full" else 0
    add_gradients(training, ledger, others)
    if text.is_tied and training.placement["language_model"] == "full":
        add_gradients(
            training, ledger, text.vocabulary * text.width
        )  # of the embedding, before it is added to the head's


def gradients_a_layer(training: Training) -> int:
    """Numbers of one decoder layer that get a gradient."""
    how = training.placement["language_model"]
    text = training.shape.text
    if how == "full":
        return text.linear_parameters + text.other_parameters
    if how == "frozen":
        return 0
    return sum(
        training.rank * (inner + outer) + training.dora * outer
        for name, (inner, outer) in text.projections.items()
        if training.targets is None or name in training.targets
    )
