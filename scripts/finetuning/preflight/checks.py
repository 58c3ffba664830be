"""What cannot work is refused before any weight is loaded, all of it at once: what, why, and what to set instead."""

import importlib.util
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_kernels_available

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.data.shared_prefix import uses_shared_prefix
from finetuning.device import compute_capability, smallest_gpu, weight_dtype
from finetuning.kernels.lora_layers import FUSED_LAYERS, PROJECTIONS
from finetuning.models.loading import is_vision
from finetuning.models.parts import count_parameters
from finetuning.models.trainable import set_trainable
from finetuning.preflight.memory import Job, bytes_of_optimizer, count_numbers, memory_problems
from finetuning.strategy import CONFIGS, Strategy

# What the names of transformers' optimizers that come from bitsandbytes begin with.
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged", "rmsprop_bnb")
# What of TRL's options rows with images do not pass through: its default, and what is done instead.
FOR_TEXT = {
    "assistant_only_loss": (True, "the assistant's turns are supervised, nothing else"),
    "completion_only_loss": (None, "the assistant's turns are supervised, nothing else"),
    "dataset_kwargs": (None, "they are tokenised when a batch is made"),
    "dataset_num_proc": (None, "they are tokenised when a batch is made, by dataloader_num_workers processes"),
    "eval_packing": (None, "they stay side by side"),
    "shuffle_dataset": (False, "each epoch draws them in a new order, as train_sampling_strategy says"),
    "truncation_mode": ("keep_start", "they are never cut"),
}


def refuse_what_cannot_work(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    train_rows: Dataset,
    validation_rows: Dataset | None,
) -> None:
    """Raise ValueError that lists every reason for which this run would fail, hang, or train something else.

    Loads no weights: what would be trained is found on the meta device. Takes a second or two for a 7B model.
    """
    capability = None if training_args.use_cpu else compute_capability()
    problems = [
        *strategy_problems(script_args, training_args, model_args),
        *precision_problems(script_args, training_args, model_args, train_rows, capability),
        *row_problems(script_args, training_args, train_rows, validation_rows),
        *graph_problems(script_args, training_args, model_args, train_rows, capability),
        *fp8_problems(script_args, training_args, model_args, capability, config),
    ]
    try:
        placed = place_without_weights(config, script_args, training_args, model_args)
    except ValueError as error:
        problems.append(str(error))
        counts = {}
    else:
        counts = count_parameters(placed)
        job = describe_job(placed, script_args, training_args, model_args)
        problems += memory_problems(job, None if training_args.use_cpu else smallest_gpu())
    problems += disk_problems(training_args, counts, len(train_rows))
    if problems:
        raise ValueError("this run cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems))


def strategy_problems(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> list[str]:
    """Quantisation, checkpointing and the optimizer against how the work is divided."""
    problems = []
    how, quantised = Strategy.from_environment(), model_args.load_in_4bit or model_args.load_in_8bit
    placements = set(script_args.placement.values())
    checkpointing = (training_args.gradient_checkpointing_kwargs or {}) if training_args.gradient_checkpointing else {}

    if how.is_one_process and training_args.n_gpu > 1:
        problems.append(
            f"one process sees {training_args.n_gpu} GPUs and would copy the model at every step (nn.DataParallel, which "
            f"SFTTrainer refuses): launch with accelerate launch --config_file {CONFIGS}/ddp.yaml --num_processes "
            f"{training_args.n_gpu}, or put CUDA_VISIBLE_DEVICES=0 before the command"
        )
    if how.is_fsdp:
        if how.stage != 2:
            problems.append(f"fsdp_version 1 is not supported here: launch with {CONFIGS}/fsdp2.yaml")
        if PartialState().distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
            problems.append(
                "FSDP without GPUs: accelerate would train plain DDP without a word. Launch with "
                f"{CONFIGS}/ddp.yaml (several processes) or {CONFIGS}/cpu.yaml"
            )
    if quantised and how.is_deepspeed and how.shards_weights:
        problems.append(
            "ZeRO-3 cannot divide quantised weights, each GPU would load the whole model or fail (peft#2016, "
            f"transformers#24395): launch with {CONFIGS}/ddp.yaml, since a 4-bit 7B model takes 5 GB on each GPU, with "
            f"{CONFIGS}/fsdp2.yaml to divide it, or set load_in_4bit: false"
        )
    if model_args.load_in_8bit and how.is_fsdp:
        problems.append(
            f"FSDP2 cannot divide 8-bit weights: set load_in_4bit: true instead, or launch with {CONFIGS}/ddp.yaml"
        )
    if model_args.load_in_4bit and how.is_fsdp and model_args.bnb_4bit_quant_storage != "float32":
        problems.append(
            "FSDP2 divides 4-bit weights only when they are stored as floating-point numbers, and changes one in a thousand "
            "of those stored in 16 bits (bitsandbytes#1945): set bnb_4bit_quant_storage: float32, which is "
            f"{model_args.bnb_4bit_quant_storage or 'uint8'}"
        )
    if quantised and "lora" not in placements:
        problems.append("quantised weights cannot be trained in full: set load_in_4bit: false, or a part to lora")
    if "lora" in placements and checkpointing.get("use_reentrant") is False and how.is_deepspeed and how.shards_weights:
        problems.append(
            "use_reentrant: false of LoRA under ZeRO-3 would be turned into true by TRL (trl#2514): remove use_reentrant "
            "from gradient_checkpointing_kwargs, and checkpointing is not reentrant; layers are gathered whole here, which "
            "that needs"
        )
    if "lora" in placements and checkpointing.get("use_reentrant") and how.is_ddp:
        problems.append(
            "reentrant checkpointing of LoRA under DDP fails with 'marked ready twice' (trl#921, peft#313): remove "
            "use_reentrant from gradient_checkpointing_kwargs"
        )
    if checkpointing.get("selective"):
        problems.append(
            "selective checkpointing stops at the first step: TRL 1.16 looks for it where transformers 5.23 no longer does, "
            "and PyTorch does not know it. Remove selective from gradient_checkpointing_kwargs; checkpoint_layers says how "
            "much is computed again"
        )
    if how.is_fsdp and training_args.optim.value.startswith(BITSANDBYTES_OPTIMIZERS):
        problems.append(
            f"optim: {training_args.optim.value} is one of bitsandbytes, which cannot step weights that FSDP2 divides "
            "(bitsandbytes#1633: illegal memory access): set optim: adamw_torch"
        )
    if how.is_deepspeed and "optimizer" in how.offloads and not training_args.optim.value.startswith("adamw_torch"):
        problems.append(
            f"optim: {training_args.optim.value} keeps its state on the GPU, but this launch offloads the optimizer to "
            f"main memory: set optim: adamw_torch, or launch with {CONFIGS}/deepspeed_zero3.yaml"
        )
    return problems


def precision_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    rows: Dataset,
    capability: tuple[int, int] | None,
) -> list[str]:
    """Types and attention against the GPU and the rows: `capability` as CUDA gives it, None without a GPU."""
    problems = []
    computes = str(weight_dtype(training_args.fp16, training_args.bf16)).removeprefix("torch.")
    # Where nothing computes in 16 bits, adapters bring their input into their own type; parts trained in full do not.
    any_goes = computes == "float32" and "full" not in script_args.placement.values()
    if model_args.dtype not in ("auto", "float32", computes) and not any_goes:
        problems.append(
            f"dtype: {model_args.dtype}, but this run computes in {computes}, and the two do not mix (unsloth#7506: "
            "BFloat16 != Half): remove dtype, the weights then follow the run"
        )
    attention = model_args.attn_implementation or "sdpa"
    if attention in ("flash_attention_2", "flash_attention_3"):
        needs, package = {
            "flash_attention_2": ((8, 0), "flash_attn"),
            "flash_attention_3": ((9, 0), "flash_attn_interface"),
        }[attention]
        if capability is None:
            problems.append(f"attn_implementation: {attention} needs a GPU: set attn_implementation: sdpa")
        elif capability < needs:
            problems.append(
                f"attn_implementation: {attention} needs compute capability {needs[0]}.{needs[1]}, this GPU has "
                f"{capability[0]}.{capability[1]} (LLaVA-NeXT#224): set attn_implementation: sdpa"
            )
        elif importlib.util.find_spec(package) is None:
            problems.append(
                f"attn_implementation: {attention}, but {package} is not installed: set attn_implementation: sdpa, "
                "which PyTorch brings and which is as fast on LLaVA's rows"
            )
        elif not (training_args.fp16 or training_args.bf16):
            problems.append(f"attn_implementation: {attention} computes in 16 bits only: set bf16: true or sdpa")
    elif "/" in attention:
        if not is_kernels_available():
            problems.append(
                f"attn_implementation: {attention} comes from the Hub by the package kernels, which is not installed: set "
                "attn_implementation: sdpa"
            )
    elif attention == "flex_attention" and capability is None:
        problems.append(
            "attn_implementation: flex_attention has no backward pass on a CPU: set attn_implementation: sdpa"
        )
    elif attention == "packed" and "images" in rows.column_names:
        problems.append("attn_implementation: packed is for text, rows with images are not packed: set sdpa")
    elif attention not in ("sdpa", "packed", "eager", "flex_attention"):
        problems.append(
            f"attn_implementation: {attention} is unknown; there are sdpa, packed, eager, flex_attention, flash_attention_2, "
            "flash_attention_3"
        )
    if (
        attention.startswith("flash_attention")
        and "images" in rows.column_names
        and uses_shared_prefix(script_args, rows)
    ):
        problems.append(
            f"attn_implementation: {attention} takes no mask, which dialogues that share their image need: set "
            "attn_implementation: sdpa, or share_image_prefix: false"
        )
    return problems


def rows_without_image(rows: Dataset) -> int:
    """How many rows of a vision dataset carry no image; no picture is decoded. 0 for a text dataset."""
    if "images" not in rows.column_names:
        return 0
    return pc.sum(pc.equal(pc.list_value_length(rows.data.column("images")), 0)).as_py() or 0


def row_problems(
    script_args: ScriptArguments, training_args: TrainingArguments, rows: Dataset, validation_rows: Dataset | None
) -> list[str]:
    """What the rows carry against how they are batched and how the work is divided."""
    problems = []
    if "images" in rows.column_names and (training_args.packing or training_args.padding_free):
        problems.append(
            "packing and padding_free are for text: rows with images are trained side by side. Remove them from the recipe"
        )
    if "images" in rows.column_names and training_args.max_length is not None:
        problems.append(
            f"max_length: {training_args.max_length} has no effect on rows with images, which are never cut: a cut image "
            "cannot be used (LlamaFactory#6131). Remove it from the recipe, and rows that are too long from the data: "
            f"python scripts/check_data.py --max_length {training_args.max_length} names them"
        )
    if "images" in rows.column_names:
        problems += [
            f"{key}: {getattr(training_args, key)} has no effect on rows with images: {reason}. Remove it from the recipe"
            for key, (default, reason) in FOR_TEXT.items()
            if getattr(training_args, key) != default
        ]
    how, sees = Strategy.from_environment(), {script_args.projector, script_args.vision_tower} != {"frozen"}
    evaluated = None if training_args.eval_strategy == "no" else validation_rows
    if how.shards_weights and evaluated is not None and (without := rows_without_image(evaluated)):
        problems.append(
            f"{without} of {len(evaluated)} validation rows have no image, and an evaluation of divided weights then waits "
            f"for ever too: leave these rows out, set eval_strategy: no, or launch with {CONFIGS}/ddp.yaml"
        )
    if without := rows_without_image(rows):
        found = f"{without} of {len(rows)} training rows have no image. "
        if how.shards_weights:
            problems.append(
                f"{found}Where weights are divided, a process whose rows skip the vision tower waits for ever for the others "
                f"(DeepSpeed#7170): leave these rows out, or launch with {CONFIGS}/ddp.yaml"
            )
        elif sees and how.is_deepspeed:
            problems.append(
                f"{found}DeepSpeed averages what has a gradient, and a process without a picture has none for the projector "
                f"or the vision tower: the processes send different things, and wait for ever. Launch with {CONFIGS}/ddp.yaml, "
                "leave these rows out, or set projector and vision_tower to frozen"
            )
        elif sees and how.is_ddp and not training_args.ddp_find_unused_parameters:
            problems.append(
                f"{found}A batch of them leaves the projector or the vision tower without gradient, and DDP then stops with "
                "'Expected to have finished reduction' (LlamaFactory#6376): remove ddp_find_unused_parameters: false"
            )
    return problems


def graph_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    rows: Dataset,
    capability: tuple[int, int] | None,
) -> list[str]:
    """`cuda_graphs` against all that a recorded pass cannot do."""
    if not script_args.cuda_graphs:
        return []
    how, attention = Strategy.from_environment(), model_args.attn_implementation or "sdpa"
    rows_side_by_side = training_args.packing or training_args.padding_free
    layers = script_args.checkpoint_layers if training_args.gradient_checkpointing else "0"
    cannot = {
        "images in the rows: their steps keep a GPU busy as it is": "images" in rows.column_names,
        "no GPU of compute capability 8.0 or newer": capability is None or capability < (8, 0),
        f"a launch by {how}: gradients are averaged while the passes run": not how.is_one_process,
        "fused_lora: false": not script_args.fused_lora,
        f"language_model: {script_args.language_model}": script_args.language_model != "lora",
        f"attn_implementation: {attention} (sdpa or packed would do)": attention not in ("sdpa", "packed"),
        f"attn_implementation: {attention} with rows side by side (packed would do)": rows_side_by_side
        and attention == "sdpa",
        f"checkpoint_layers: {layers} (auto or 0 would do)": layers not in ("auto", "0"),
        "gradient_checkpointing_kwargs": training_args.gradient_checkpointing
        and bool(training_args.gradient_checkpointing_kwargs),
    }
    found = [reason for reason, holds in cannot.items() if holds]
    return [f"cuda_graphs cannot go with {'; '.join(found)}: set cuda_graphs: false, or change that"] if found else []


def fp8_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    capability: tuple[int, int] | None,
    config: PreTrainedConfig,
) -> list[str]:
    """`base_precision: fp8_backward` against GPU, launch, recipe and the shape of the model."""
    if script_args.base_precision is None:
        return []
    targets, launch = model_args.lora_target_modules, Strategy.from_environment()
    missing = set() if targets in (None, "all-linear", ["all-linear"]) else {*PROJECTIONS} - {*targets}
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = [text.hidden_size, text.intermediate_size]
    widths += [heads * head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)]
    uneven = sorted({width for width in widths if width % 16})
    kinds = [layer.__name__.removesuffix("DecoderLayer").lower() for layer in FUSED_LAYERS]
    cannot = {
        "a CPU (compute capability 8.9 or newer would do)": capability is None,
        f"compute capability {'.'.join(map(str, capability or ()))} (8.9 or newer would do)": capability is not None
        and capability < (8, 9),
        "fp16: true (bf16 would do)": training_args.fp16,
        "quantised weights (load_in_4bit: false would do)": model_args.load_in_4bit or model_args.load_in_8bit,
        f"language_model: {script_args.language_model} (lora would do)": script_args.language_model != "lora",
        "fused_lora: false (true would do)": not script_args.fused_lora,
        "use_dora: true (false would do)": model_args.use_dora,
        f"lora_target_modules without {', '.join(sorted(missing))} (all-linear would do)": bool(missing),
        f"a launch by {launch}, where weights come and go ({CONFIGS}/ddp.yaml or deepspeed_zero2.yaml would do)": (
            launch.shards_weights
        ),
        f"a model of type {text.model_type} ({' or '.join(kinds)} would do)": text.model_type not in kinds,
        f"layers of width {', '.join(map(str, uneven))} (multiples of 16 would do)": bool(uneven),
    }
    found = [reason for reason, holds in cannot.items() if holds]
    how = f"base_precision: {script_args.base_precision}"
    return [f"{how} cannot go with {'; '.join(found)}: leave base_precision out, or change that"] if found else []


def searches_unused_parameters(script_args: ScriptArguments, training_args: TrainingArguments, rows: Dataset) -> bool:
    """`ddp_find_unused_parameters` of the recipe; where it is silent, whether DDP must look for parameters without gradient at every step, which costs a walk over the whole graph.

    Only a batch without a single image leaves something out, and only what sees the image. TRL searches for every
    vision model, and transformers for every model without checkpointing.
    """
    if training_args.ddp_find_unused_parameters is not None:
        return training_args.ddp_find_unused_parameters
    sees = {script_args.projector, script_args.vision_tower} - {"frozen"}
    return bool(sees) and rows_without_image(rows) > 0


def place_without_weights(
    config: PreTrainedConfig, script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> nn.Module:
    """The model as it will be placed, on the meta device. Raises ValueError where the placement cannot be had."""
    auto_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would divide even these weights, which do not exist
    try:
        with torch.device("meta"):
            return set_trainable(auto_class.from_config(config), script_args, model_args)
    finally:
        if training_args.deepspeed_plugin is not None:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def describe_job(
    placed: nn.Module, script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> Job:
    """What decides the least memory of each GPU."""
    optim = training_args.optim.value
    return Job(
        **count_numbers(placed),
        is_lora="lora" in script_args.placement.values(),
        strategy=replace(Strategy.from_environment(), num_processes=training_args.world_size),
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        dtype=model_args.dtype,
        # Pages of the optimizer's state may lie in main memory.
        optimizer_bytes=0 if optim.startswith("paged") else bytes_of_optimizer(optim),
    )


def disk_problems(training_args: TrainingArguments, counts: dict[str, dict[str, int]], num_rows: int) -> list[str]:
    """Whether the run's folder can be written, and its checkpoints fit on the disk; a low estimate, in bytes."""
    folder = Path(training_args.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return [f"output_dir: {folder} cannot be made, {existing} is a file: give another folder"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output_dir: no permission to write in {existing}: give another folder, or ask for the permission"]
    trained = sum(part["trainable"] for part in counts.values())
    whole = sum(part["total"] for part in counts.values()) if not any(part["lora"] for part in counts.values()) else 0
    weights = max(4 * trained, 2 * whole)
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
