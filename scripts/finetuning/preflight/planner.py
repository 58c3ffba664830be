"""A recipe on a GPU: what it needs, how long it takes, what fits. No PyTorch, no weights."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuning.command_line import parse_mixer
from finetuning.data.image_tiles import num_views, parse_tiles
from finetuning.model_files import config_of
from finetuning.model_shape import ModelShape
from finetuning.preflight.planned_step import Batch, Training
from finetuning.preflight.row_lengths import (
    Lengths,
    PictureCost,
    RowCounter,
    Sequence,
    Size,
    lengths_of,
    mixed,
    read_split,
    several_dialogues_an_image,
)
from finetuning.preflight.step_memory import fewest_checkpointed, process_memory
from finetuning.preflight.step_time import EFFICIENCY, Gpu, has_8_bit_products, step_seconds
from finetuning.strategy import Strategy, divide_batch

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
LLAMA3_VOCABULARY = 128_000
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")  # of a model, for a plan
DRAWN_BATCHES = 200  # random batches whose padded length is looked at


@dataclass(frozen=True)
class Workload:
    """A recipe's model and rows."""

    settings: dict[str, Any]
    shape: ModelShape
    train: Lengths
    validation: Lengths | None
    shares_prefix: bool


@dataclass(frozen=True)
class Plan:
    """One recipe on one kind of GPU under one strategy. Bytes and seconds."""

    gpu: Gpu
    strategy: str  # file of accelerate_configs/, without .yaml
    training: Training
    batch: Batch
    accumulation: int
    memory: dict[str, float]
    step: dict[str, float]
    fast_host: float  # seconds of a step where the host launches twice as fast
    steps: int
    epochs: float
    tokens: float  # of the run, without padding
    evaluation_seconds: float
    evaluations: int

    @property
    def peak(self) -> float:
        """What one process needs at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is within the GPU."""
        return self.peak <= self.gpu.memory

    @property
    def processes(self) -> int:
        """Of the launch."""
        return self.training.strategy.num_processes

    @property
    def step_seconds(self) -> float:
        """Of one step, its accumulated batches included."""
        return sum(self.step.values())

    @property
    def seconds(self) -> float:
        """Of the whole run, without loading the weights."""
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    @property
    def allocated(self) -> float:
        """Of the peak what PyTorch allocates: without the allocator's fragments and the CUDA context."""
        return sum(size for part, size in self.memory.items() if part not in ("allocator", "context"))

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs: what is paid for."""
        return self.seconds / 3600 * self.processes


def model_folder(name: str, revision: str) -> Path:
    """Folder with `config.json` and `tokenizer.json` of a model: its own, or the Hub's cache. Raises ValueError without."""
    if config_of(name) is not None:
        missing = [file for file in NEEDED if not (Path(name) / file).is_file()]
        if missing:
            raise ValueError(f"{name}: {', '.join(missing)} is missing: download the model with all its small files")
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "*.jinja", "*.model"]
    try:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not all((folder / file).is_file() for file in NEEDED):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name}: its config cannot be had ({str(error).splitlines()[0]}): check the name and the network, or download "
            f"it before: hf download {name} --include '*.json'"
        ) from error
    return folder


def read_workload(settings: dict[str, Any]) -> Workload:
    """Model and rows of a recipe's settings. Raises ValueError that says what is missing."""
    folder = model_folder(settings["model_name_or_path"], settings["model_revision"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = ModelShape.from_config(config)
    counter = RowCounter(folder, template_text(settings, config, shape, folder), picture_cost(settings, config, shape))
    table = read_split(settings["dataset_name"], settings["dataset_train_split"])
    shares = settings["share_image_prefix"]
    can_share = shape.vision is not None and not shape.vision.pooled  # Gemma 3's image tokens see one another
    shares = can_share and (several_dialogues_an_image(table) if shares is None else shares)
    train = lengths_of(table, counter, shares_prefix=shares, folder=settings["dataset_name"])
    parts = [(train, 1.0)]
    for name, weight in (parse_mixer(settings["dataset_mixer"], settings["dataset_name"]) or {}).items():
        rows = read_split(name, settings["dataset_train_split"])
        parts.append((lengths_of(rows, counter, shares_prefix=shares, folder=name), weight))
    train = mixed(parts) if len(parts) > 1 else train
    validation = None
    if settings["eval_strategy"] != "no":
        try:
            rows = read_split(settings["dataset_name"], settings["dataset_validation_split"])
        except ValueError:  # training says so too, and goes on without
            rows = None
        if rows is not None and len(rows):
            validation = lengths_of(rows, counter, shares_prefix=False, folder=settings["dataset_name"])
    return Workload(settings, shape, train, validation, shares)


def template_text(settings: dict[str, Any], config: dict[str, Any], shape: ModelShape, folder: Path) -> str:
    """The chat template that training uses, each picture as the text that its tokens stand in.

    Raises ValueError where a language model's dialogues are not known.
    """
    if settings["chat_template_path"]:
        name = settings["chat_template_path"]
    elif shape.vision is None and shape.text.kind.startswith("gemma"):
        name = TEMPLATES / "gemma.jinja"
    elif shape.kind == "llava" and shape.text.kind == "llama" and shape.text.vocabulary < LLAMA3_VOCABULARY:
        name = TEMPLATES / "llava.jinja"
    else:
        from finetuning.families import template_of  # with transformers, which takes seconds

        name = TEMPLATES / template_of(config_object(config))
    template = Path(name).read_text(encoding="utf-8")
    if shape.kind == "gemma3":
        marks = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        begin, inside, end = (marks[f"{key}_token"] for key in ("boi", "image", "eoi"))
        # As its processor writes them.
        template = template.replace(json.dumps(begin), json.dumps(f"\n\n{begin}{inside}{end}\n\n"))
        template = template.replace(f"'{begin}'", json.dumps(f"\n\n{begin}{inside}{end}\n\n"))
    return template


def picture_cost(settings: dict[str, Any], config: dict[str, Any], shape: ModelShape) -> PictureCost:
    """What pictures become in that model, under `image_tiles` and `image_max_tiles`. Raises ValueError for what it has not."""
    views = num_views(parse_tiles(settings["image_tiles"]))
    most = settings["image_max_tiles"]
    if shape.vision is None or "image_grid_pinpoints" not in config:
        if most is not None:
            raise ValueError(f"image_max_tiles: {most}, but {shape.kind} sees a picture in one view: remove it")
        tokens = shape.vision.tokens if shape.vision is not None else 1
        return PictureCost(lambda sizes: (len(sizes) * views * tokens, len(sizes) * views), marks=views)
    from finetuning.families import FAMILIES

    family, full, side = FAMILIES[shape.kind], config_object(config), shape.vision.image_size
    grids = config["image_grid_pinpoints"]
    full.image_grid_pinpoints = [grid for grid in grids if most is None or grid[0] * grid[1] <= most * side**2]
    if not full.image_grid_pinpoints:
        raise ValueError(f"image_max_tiles: {most}, but the smallest grid of {shape.kind} has more tiles")

    def of_row(sizes: list[Size]) -> tuple[int, int]:
        as_views = family.several_as_views and len(sizes) > 1
        tokens = sum(family.features_of_row(full, sizes, (side, side)))
        return tokens, len(sizes) if as_views else sum(family.views(full, size) for size in sizes)

    return PictureCost(of_row, reads_sizes=True)


def config_object(config: dict[str, Any]) -> Any:
    """transformers' config of a `config.json`, with the defaults of its class."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def training_of(workload: Workload, strategy: Strategy, gpu: Gpu, *, bits: int | None) -> Training:
    """What is trained, on that GPU. Raises ValueError for what the GPU cannot do."""
    settings, shape = workload.settings, workload.shape
    if settings["bf16"] and not gpu.has_bf16:
        raise ValueError(f"{gpu.title} has no bf16: remove bf16 from the recipe")
    in_8_bits = settings["base_precision"]
    if in_8_bits and not has_8_bit_products(in_8_bits, gpu.capability):
        raise ValueError(f"{gpu.title} cannot do base_precision: {in_8_bits}: remove it from the recipe")
    precision = "fp16" if settings["fp16"] or not (settings["bf16"] or gpu.has_bf16) else "bf16"
    parts = [part for part in ("language_model", "projector", "vision_tower") if part in shape.parameters]
    placement = {part: settings[part] for part in parts}
    targets = settings["lora_target_modules"]
    targets = None if targets in (None, "all-linear") else (targets,) if isinstance(targets, str) else tuple(targets)
    is_lora = "lora" in placement.values()
    wide = settings["dtype"] == "float32" or (settings["dtype"] == "auto" and not is_lora and not strategy.is_deepspeed)
    return Training(
        shape=shape,
        placement=placement,
        rank=settings["lora_r"],
        targets=targets,
        dropout=settings["lora_dropout"] if is_lora else 0.0,
        bits=bits,
        nested=settings["use_bnb_nested_quant"],
        base_precision=settings["base_precision"],
        precision=precision,
        weight_bytes=4 if wide else 2,
        optimizer=settings["optim"],
        strategy=strategy,
        fused=settings["fused_lora"],
        dora=settings["use_dora"],
        shares_prefix=workload.shares_prefix,
        packs_rows=settings["packing"] or settings["padding_free"],
    )


def batches_of(workload: Workload, rows: int) -> tuple[Batch, Batch, float]:
    """The largest batch of `rows` on a process, a mean one, and the share of a batch's sequences that are rows."""
    settings, train = workload.settings, workload.train
    if settings["packing"]:
        length = settings["max_length"] or 1024
        real = train.mean("tokens")
        supervised = int(rows * length * train.mean("supervised") / max(real, 1))
        longest = min(max(sequence.tokens for sequence in train.longest), length)
        batch = Batch(1, rows * length, supervised, 0, longest)
        return batch, replace(batch, longest=math.ceil(real)), length / max(real, 1)
    largest = batch_of(train.longest[:rows], rows, settings["padding_free"])
    drawn = random.Random(0)
    batches = [
        batch_of(drawn.choices(train.counted, k=rows), rows, settings["padding_free"]) for _ in range(DRAWN_BATCHES)
    ]
    mean = Batch(
        largest.rows,
        math.ceil(sum(batch.length for batch in batches) / len(batches)),
        math.ceil(sum(batch.supervised for batch in batches) / len(batches)),
        largest.pictures,
        math.ceil(sum(batch.longest for batch in batches) / len(batches)),
        largest.prefix,
    )
    return largest, mean, 1.0


def batch_of(sequences: list[Sequence], rows: int, side_by_side: bool) -> Batch:
    """A batch of sequences, repeated to `rows` where they are fewer; padded to the longest, or side by side."""
    sequences = (sequences * rows)[:rows]
    longest = max(sequence.tokens for sequence in sequences)
    supervised = sum(sequence.supervised for sequence in sequences)
    pictures = sum(sequence.pictures for sequence in sequences)
    prefixes = {sequence.prefix for sequence in sequences}
    if side_by_side:
        return Batch(1, sum(sequence.tokens for sequence in sequences), supervised, pictures, longest)
    return Batch(rows, longest, supervised, pictures, longest, prefixes.pop() if len(prefixes) == 1 else 0)


def make_plan(
    workload: Workload, gpu: Gpu, strategy: Strategy, *, bits: int | None, file: str = "", host: float = 1.0
) -> Plan:
    """The recipe under a strategy, of `accelerate_configs/<file>.yaml`; `host` as in `step_seconds`.

    Raises ValueError where it cannot be.
    """
    settings, processes = workload.settings, strategy.num_processes
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    if settings["global_batch_size"] is not None:
        rows, accumulation = divide_batch(settings["global_batch_size"], rows, processes)
    training = training_of(workload, strategy, gpu, bits=bits)
    training = replace(training, accumulates=accumulation > 1)
    recomputes_all = settings["gradient_checkpointing"] and settings["checkpoint_layers"] == "all"
    # Of layers that are not recomputed all that they keep is offloaded too, which is not planned.
    training = replace(training, offloads_inputs=settings["activation_offloading"] and recomputes_all)
    largest, mean, rows_a_sequence = batches_of(workload, rows)
    if not workload.shares_prefix:
        largest, mean = replace(largest, prefix=0), replace(mean, prefix=0)
    training = replace(training, checkpointed=checkpointed_layers(settings, training, largest, gpu))
    step = step_seconds(training, mean, gpu, accumulation, host)
    sequences_a_step = rows * accumulation * processes
    an_epoch = math.ceil(workload.train.total / rows_a_sequence / sequences_a_step)
    epochs = float(settings["num_train_epochs"])
    steps = settings["max_steps"] if settings["max_steps"] > 0 else math.ceil(an_epoch * epochs)
    epochs = steps / an_epoch
    evaluations = evaluations_of(settings, steps, epochs) if workload.validation is not None else 0
    return Plan(
        gpu=gpu,
        strategy=file,
        training=training,
        batch=largest,
        accumulation=accumulation,
        memory=process_memory(training, largest),
        step=step,
        fast_host=sum(step_seconds(training, mean, gpu, accumulation, host / 2).values()),
        steps=steps,
        epochs=epochs,
        tokens=steps * sequences_a_step * rows_a_sequence * workload.train.mean("tokens"),
        evaluation_seconds=evaluation_seconds(workload, training, gpu),
        evaluations=evaluations,
    )


def checkpointed_layers(settings: dict[str, Any], training: Training, batch: Batch, gpu: Gpu) -> int:
    """`checkpoint_layers` as training will resolve it; all layers where not even they are enough."""
    layers = training.shape.text.layers
    if not settings["gradient_checkpointing"]:
        return 0
    if training.strategy.shards_weights or settings["checkpoint_layers"] == "all":
        return layers
    if settings["checkpoint_layers"] != "auto":
        return min(int(settings["checkpoint_layers"]), layers)
    fewest = fewest_checkpointed(training, batch, gpu.memory * 0.95)
    return layers if fewest is None else fewest


def evaluations_of(settings: dict[str, Any], steps: int, epochs: float) -> int:
    """How often a run of `steps` is evaluated."""
    if settings["eval_strategy"] == "epoch":
        return math.ceil(epochs)
    every = settings["eval_steps"] or settings["logging_steps"]
    every = math.ceil(every * steps) if every < 1 else int(every)
    return steps // every


def evaluation_seconds(workload: Workload, training: Training, gpu: Gpu) -> float:
    """Loss of the validation rows, and answers to some: prompts like a forward pass, then one pass over the weights a token."""
    rows = workload.validation
    if rows is None:
        return 0.0
    settings, text = workload.settings, training.shape.text
    processes = training.strategy.num_processes
    size = min(settings["per_device_eval_batch_size"], max(rows.total, 1))
    batch = batch_of(rows.counted[:size], size, False)
    without = replace(training, checkpointed=0, strategy=Strategy("one process"))
    forward = sum(step_seconds(without, replace(batch, prefix=0), gpu).values()) / 3
    answered = min(settings["eval_answers"], rows.total)
    batches = math.ceil(rows.total / size / processes) + math.ceil(answered / size / processes)
    tokens = min(settings["eval_max_new_tokens"], 2 * rows.mean("supervised") + 2) if answered else 0
    weights = text.parameters * (0.6 if training.bits == 4 else 2)
    decoding = tokens * max(
        weights / (gpu.bandwidth * EFFICIENCY.bandwidth), text.layers * EFFICIENCY.repeated_layer / 4
    )
    return batches * forward + decoding


def bits_of(settings: dict[str, Any]) -> int | None:
    """Of the base's linear layers, where they are stored in fewer than 16; INT8 keeps a copy for gradients."""
    if settings["base_precision"] == "int8":
        return None
    return 4 if settings["load_in_4bit"] else 8 if settings["load_in_8bit"] else None


def strategies_for(processes: int, *, bits: int | None) -> list[str]:
    """Files of accelerate_configs/ that can be launched so: 4-bit weights are sharded by FSDP2 alone."""
    if processes == 1:
        return ["single_gpu"]
    return ["ddp", "fsdp2"] if bits else ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def all_plans(
    workload: Workload, gpus: list[Gpu], processes: int, only: str | None = None
) -> Iterator[Plan | tuple[Gpu, str, str]]:
    """The recipe on every GPU under every strategy, in 4 bits too where it has adapters; (gpu, strategy, why not) where it cannot be.

    `only` is a file of accelerate_configs/: that launch, as the recipe says it.
    """
    settings = workload.settings
    own = bits_of(settings)
    kinds = [own, *([4] if own is None and settings["language_model"] == "lora" and only is None else [])]
    for gpu in gpus:
        for bits in kinds:
            for file in [only] if only else strategies_for(processes, bits=bits):
                try:
                    strategy = replace(Strategy.from_file(file), num_processes=processes)
                    yield make_plan(workload, gpu, strategy, bits=bits, file=file)
                except ValueError as error:
                    yield gpu, file, str(error)
