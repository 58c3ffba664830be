"""How many decoder layers are computed again in the backward pass: as few as fit the GPU that is there.

Checkpointing every layer costs a third of a step. The layers kept are the last ones: the backward pass starts there and
has freed them when it comes to the first, which are computed again.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainingArguments

from finetuning import upstream
from finetuning.families import largest_picture
from finetuning.models.parts import decoder_layers
from finetuning.preflight.memory import bytes_of_optimizer
from finetuning.run_folder import change_arguments, checkpoints, read_arguments

# Left free for what a probe cannot see: fragments between allocations, the libraries' own buffers.
SPARE = 0.05


def parse_checkpoint_layers(value: str, num_layers: int) -> int | None:
    """`auto` -> None, `all` -> every layer, a number -> itself. Raises ValueError for anything else."""
    if value == "auto":
        return None
    if value == "all":
        return num_layers
    if value.isdecimal() and int(value) <= num_layers:
        return int(value)
    raise ValueError(f"checkpoint_layers: {value}, expected auto, all, or 0 to {num_layers} (the model's layers)")


def checkpoint_first(model: nn.Module, count: int) -> None:
    """Checkpoint the first `count` decoder layers, and nothing else."""
    for index, layer in enumerate(decoder_layers(model)):
        upstream.replace(layer, "gradient_checkpointing", index < count)
        upstream.replace(layer, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))


def fewest_that_fit(peak_with: Callable[[int], float], num_layers: int, free: float) -> int:
    """Fewest checkpointed layers with which `peak_with(count)` (bytes, inf if out of memory) leaves SPARE of `free` bytes.

    Every number is tried before it is taken, by bisection: 6 tries for 32 layers. All layers where even these leave less.
    Raises ValueError if not even all layers fit.
    """
    budget = free * (1 - SPARE)
    if peak_with(0) <= budget:
        return 0
    everything = peak_with(num_layers)
    if everything > free:
        raise ValueError(
            f"a step needs {describe(everything)} with every layer checkpointed, and {describe(free)} are free: set a "
            "smaller per_device_train_batch_size (and more gradient_accumulation_steps), or load_in_4bit: true"
        )
    too_few, enough = 0, num_layers
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if peak_with(middle) <= budget:
            enough = middle
        else:
            too_few = middle
    return enough


def describe(size: float) -> str:
    """Bytes in GiB, for people."""
    return "more memory than there is" if math.isinf(size) else f"{size / 2**30:.1f} GiB"


def peak_of_a_step(model: nn.Module, batch: dict[str, Any], passes: int, count: int) -> float:
    """Bytes that `passes` forward and backward passes of `batch` need at most on this device, the largest of all processes.

    A second pass finds the gradients of the first, as all but the first batch of an accumulated step do.
    """
    checkpoint_first(model, count)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(passes):
            model(**batch, use_cache=False, fused_lm_head=True).loss.backward()
        peak = float(torch.cuda.max_memory_allocated())
    except torch.OutOfMemoryError:
        peak = math.inf
    model.zero_grad(set_to_none=True)
    if dist.is_initialized():
        peaks = torch.tensor(peak, device="cuda")
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        peak = peaks.item()
    return peak


def longest_rows(dataset: Any, number: int) -> list[int]:
    """Indices of the rows with most text: with pictures of as many tokens each, the batch that needs most memory."""
    stored = dataset.with_format("arrow")
    column = next(name for name in ("characters", "input_ids", "messages") if name in dataset.column_names)
    values = stored[column].to_pylist()
    lengths = [value if column == "characters" else len(value) for value in values]
    if column == "messages":
        lengths = [sum(len(message["content"]) for message in messages) for messages in values]
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:number]


def with_largest_pictures(rows: list[dict[str, Any]], size: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Rows whose pictures become the most tokens that a picture can: grey ones of `size` (height, width); as given without."""
    if size is None:
        return rows
    grey = Image.new("RGB", (size[1], size[0]), (128, 128, 128))
    return [row | {"images": [grey] * len(row.get("images") or [])} for row in rows]


def optimizer_state(model: nn.Module, args: TrainingArguments) -> int:
    """Bytes of the optimizer's state, which a try does not see."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name = args.optim.value
    # Pages may lie in main memory; of an optimizer that is not known Adam's two fp32 numbers are assumed.
    return trained * (0 if name.startswith("paged") else bytes_of_optimizer(name) or 8)


def passes_of_a_try(args: TrainingArguments) -> int:
    """Two where gradients wait for more rows of a step; DDP holds them from the start."""
    return 2 if args.gradient_accumulation_steps > 1 and args.world_size == 1 else 1


class LayerCheckpointing(TrainerCallback):
    """Applies `checkpoint_layers` of the recipe when training begins, and writes the choice into `arguments.yaml`.

    `auto` tries steps on the longest rows: on a GPU the fewest layers that fit, on a CPU none. `take_more` is for a
    step that does not fit all the same.
    """

    def __init__(self, trainer: Any, wanted: str):
        self.trainer = trainer
        self.num_layers = len(decoder_layers(trainer.model))
        self.count = parse_checkpoint_layers(wanted, self.num_layers)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Checkpoint the chosen number of layers, or choose it, and keep the choice for restarts."""
        trainer, model = self.trainer, self.trainer.model
        if self.count is None:
            self.count = self.choose() if torch.cuda.is_available() and not args.use_cpu else 0
        checkpoint_first(model, self.count)
        trainer.accelerator.print(f"  {self.count} of {self.num_layers} decoder layers are checkpointed")
        if trainer.is_world_process_zero():
            change_arguments(Path(args.output_dir), checkpoint_layers=str(self.count))

    def choose(self) -> int:
        """The fewest layers with which a step on the longest rows fits this GPU; the same on all processes."""
        trainer, model = self.trainer, self.trainer.model
        rows = longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)
        examples = [trainer.train_dataset[row] for row in rows]
        batch = trainer.data_collator(with_largest_pictures(examples, largest_picture(model.config)))
        for name in ("rows", "num_supervised"):  # for the trainer, not for the model
            batch.pop(name, None)
        batch = trainer._prepare_inputs(batch)
        free, total = torch.cuda.mem_get_info()
        free = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
        free -= optimizer_state(model, trainer.args)
        if dist.is_initialized():
            least = torch.tensor(free, device="cuda")
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            free = least.item()
        passes = passes_of_a_try(trainer.args)
        model.train()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]), trainer.compute_loss_context_manager():
            count = fewest_that_fit(partial(peak_of_a_step, model, batch, passes), self.num_layers, free)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of the tries
        return count

    def take_more(self) -> None:
        """After a step that did not fit: an eighth of the layers more. Raises ValueError when none is left."""
        if self.count == self.num_layers:
            raise ValueError(
                "out of GPU memory with every layer checkpointed: set a smaller per_device_train_batch_size. The last "
                "checkpoint is intact; the same command continues from it"
            )
        self.count = min(self.num_layers, self.count + max(1, self.num_layers // 8))
        print(f"Out of GPU memory: {self.count} of {self.num_layers} layers are checkpointed from here on")
        checkpoint_first(self.trainer.model, self.count)
        torch.cuda.empty_cache()
        change_arguments(Path(self.trainer.args.output_dir), checkpoint_layers=str(self.count))


def kept_choice(folder: str | Path, wanted: str) -> str:
    """What an interrupted run chose for `auto`, so that its continuation need not try again; else `wanted`."""
    if wanted != "auto" or not checkpoints(Path(folder)):
        return wanted
    return str((read_arguments(Path(folder)) or {}).get("checkpoint_layers", wanted))
