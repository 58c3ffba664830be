"""What cannot work is refused before any weight is loaded, all of it at once: what, why, and what to set instead."""

import math
import os
import shutil
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedConfig

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.device import compute_capability, main_memory, smallest_gpu
from finetuning.models.parts import count_parameters
from finetuning.preflight.features import (
    augmentation_problems,
    base_precision_problems,
    graph_problems,
    number_loss_problems,
    option_problems,
    rate_problems,
    start_problems,
)
from finetuning.preflight.memory import (
    bytes_of_optimizer,
    describe_job,
    main_memory_problems,
    memory_problems,
    place_without_weights,
)
from finetuning.preflight.precision import precision_problems
from finetuning.preflight.strategies import image_problems, strategy_problems

# What of TRL's options rows with images do not pass through: its default, and what is done instead.
FOR_TEXT = {
    "assistant_only_loss": (True, "the assistant's turns are supervised, nothing else"),
    "completion_only_loss": (None, "the assistant's turns are supervised, nothing else"),
    "dataset_kwargs": (None, "they are tokenised when a batch is made"),
    "dataset_num_proc": (None, "they are tokenised when a batch is made, by dataloader_num_workers processes"),
    "eval_packing": (None, "they stay side by side"),
    "shuffle_dataset": (False, "each epoch draws them in a new order, as train_sampling_strategy says"),
    "truncate": (False, "they are never cut"),
    "truncation_mode": ("keep_start", "they are never cut"),
}

MOST_ON_CPU = 1_000_000_000  # parameters of a model that is trained on a CPU unasked


def refuse_what_cannot_work(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    train_rows: Dataset,
) -> None:
    """Raise ValueError that lists every reason for which this run would fail, hang, or train something else.

    Loads no weights: what would be trained is found on the meta device. Takes a second or two for a 7B model.
    """
    capability = None if training_args.use_cpu else compute_capability()
    problems = [
        *strategy_problems(script_args, training_args, model_args),
        *precision_problems(script_args, training_args, model_args, train_rows, capability, config),
        *row_problems(training_args, train_rows),
        *image_problems(script_args, training_args, train_rows),
        *graph_problems(script_args, training_args, model_args, train_rows, capability),
        *base_precision_problems(script_args, training_args, model_args, capability, config),
        *number_loss_problems(script_args, training_args, model_args, config, train_rows),
        *augmentation_problems(script_args, training_args, train_rows),
        *option_problems(training_args, capability),
        *rate_problems(script_args, training_args),
        *skip_problems(script_args, train_rows),
        *start_problems(script_args, model_args),
    ]
    try:
        placed = place_without_weights(config, script_args, training_args, model_args)
    except ValueError as error:
        problems.append(str(error))
        counts = {}
    else:
        counts = count_parameters(placed)
        job = describe_job(placed, script_args, training_args, model_args)
        problems += processor_problems(training_args, sum(part["total"] for part in counts.values()))
        problems += memory_problems(job, None if training_args.use_cpu else smallest_gpu())
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        problems += main_memory_problems(job, main_memory(), local, on_gpu=not training_args.use_cpu)
    problems += disk_problems(training_args, counts, len(train_rows))
    if problems:
        raise ValueError("this run cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems))


def skip_problems(script_args: ScriptArguments, rows: Dataset) -> list[str]:
    """`skip_bad_rows` of rows in which nothing can be bad."""
    if not script_args.skip_bad_rows or "images" in rows.column_names:
        return []
    return [f"skip_bad_rows: {script_args.skip_bad_rows} has no effect: the rows hold no pictures. Remove it"]


def processor_problems(training_args: TrainingArguments, num_weights: int) -> list[str]:
    """Why a model of so many parameters is not trained on a CPU by mistake."""
    if not training_args.use_cpu or training_args.cpu_is_asked_for or num_weights <= MOST_ON_CPU:
        return []
    return [
        f"this machine shows no GPU, and one step of {num_weights / 1e9:.1f} billion parameters takes minutes on a CPU: look at "
        "nvidia-smi and CUDA_VISIBLE_DEVICES, or add --use_cpu true to train on the CPU all the same"
    ]


def row_problems(training_args: TrainingArguments, rows: Dataset) -> list[str]:
    """Options that these rows do not pass through: set, they would be ignored."""
    if "images" not in rows.column_names:
        if training_args.truncate and training_args.max_length is None:
            return ["truncate: true cuts nothing without max_length: set max_length, or remove truncate"]
        return []
    problems = []
    if training_args.packing or training_args.padding_free:
        problems.append(
            "packing and padding_free are for text: rows with images are trained side by side. Remove them from the recipe"
        )
    if training_args.max_length is not None:
        problems.append(
            f"max_length: {training_args.max_length} has no effect on rows with images, which are never cut: a cut image "
            "cannot be used (LlamaFactory#6131). Remove it from the recipe, and rows that are too long from the data: "
            f"python scripts/check_data.py --max_length {training_args.max_length} names them"
        )
    problems += [
        f"{key}: {getattr(training_args, key)} has no effect on rows with images: {reason}. Remove it from the recipe"
        for key, (default, reason) in FOR_TEXT.items()
        if getattr(training_args, key) != default
    ]
    return problems


def disk_problems(training_args: TrainingArguments, counts: dict[str, dict[str, int]], num_rows: int) -> list[str]:
    """Whether the run's folder can be written, and its checkpoints fit on the disk; a low estimate, in bytes."""
    folder = Path(training_args.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return [f"output_dir: {folder} cannot be made, {existing} is a file: give another folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output_dir: no permission to write in {existing}: give another folder, or ask for the permission"]
    trained = sum(part["trainable"] for part in counts.values())
    full = sum(part["total"] for part in counts.values()) if not any(part["lora"] for part in counts.values()) else 0
    weights = max(4 * trained, 2 * full)
    checkpoint = weights + bytes_of_optimizer(training_args.optim.value) * trained
    kept = min(num_checkpoints(training_args, num_rows), (training_args.save_total_limit or math.inf) + 1)
    needed = kept * checkpoint + weights
    free = shutil.disk_usage(existing).free
    if needed > free:
        return [
            f"output_dir: the run needs {needed / 2**30:.1f} GiB ({kept} checkpoints of {checkpoint / 2**30:.1f} GiB and "
            f"the result), {existing} has {free / 2**30:.1f} GiB free: make room, set save_total_limit: 1, or give another "
            "folder with --output_dir"
        ]
    return []


def num_checkpoints(training_args: TrainingArguments, num_rows: int) -> int:
    """Checkpoints that a run writes in all, whether it keeps them or not."""
    batch = (
        training_args.per_device_train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    )
    epochs = training_args.num_train_epochs
    steps = training_args.max_steps if training_args.max_steps > 0 else math.ceil(math.ceil(num_rows / batch) * epochs)
    if training_args.save_strategy == "no":
        return 0
    if training_args.save_strategy == "epoch":
        return math.ceil(steps * batch / num_rows)
    every = training_args.save_steps if training_args.save_steps >= 1 else math.ceil(training_args.save_steps * steps)
    return math.ceil(steps / every)
