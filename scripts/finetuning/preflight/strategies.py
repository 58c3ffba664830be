"""What a strategy cannot do: quantised weights, activation checkpointing, optimizers and rows against the launch.

Each rule is a function that returns the sentence for people, or None where there is nothing to say.
"""

import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.strategy import CONFIGS, Strategy

# What the names of transformers' optimizers that come from bitsandbytes begin with.
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged", "rmsprop_bnb")


def strategy_problems(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> list[str]:
    """Quantisation, activation checkpointing and the optimizer against how this launch divides the work."""
    strategy, adapts = Strategy.from_environment(), "lora" in script_args.placement.values()
    found = [
        one_process_of_many_gpus(strategy, training_args),
        fsdp_1(strategy),
        fsdp_without_gpus(strategy),
        sharded_quantised_weights(strategy, model_args),
        fsdp_of_8_bits(strategy, model_args),
        fsdp_of_4_bits_in_few(strategy, model_args),
        quantised_weights_trained_in_full(model_args, adapts=adapts),
        checkpointing_without_reentrance(strategy, training_args, adapts=adapts),
        reentrant_checkpointing(strategy, training_args, adapts=adapts),
        selective_checkpointing(training_args),
        fsdp_of_bitsandbytes_optimizer(strategy, training_args),
        offloaded_optimizer(strategy, training_args),
    ]
    return [problem for problem in found if problem]


def one_process_of_many_gpus(strategy: Strategy, training_args: TrainingArguments) -> str | None:
    """One process that sees several GPUs: transformers would wrap the model in nn.DataParallel."""
    if not strategy.is_one_process or training_args.n_gpu <= 1:
        return None
    return (
        f"one process sees {training_args.n_gpu} GPUs and would copy the model at every step (nn.DataParallel, which "
        f"SFTTrainer refuses): launch with accelerate launch --config_file {CONFIGS}/ddp.yaml --num_processes "
        f"{training_args.n_gpu}, or put CUDA_VISIBLE_DEVICES=0 before the command"
    )


def fsdp_1(strategy: Strategy) -> str | None:
    """Version 1 of FSDP flattens parameters, which LoRA and saving do not survive."""
    if not strategy.is_fsdp or strategy.stage == 2:
        return None
    return f"fsdp_version 1 is not supported here: launch with {CONFIGS}/fsdp2.yaml"


def fsdp_without_gpus(strategy: Strategy) -> str | None:
    """FSDP where accelerate finds no GPU."""
    if not strategy.is_fsdp or PartialState().distributed_type not in (DistributedType.MULTI_CPU, DistributedType.NO):
        return None
    return (
        "FSDP without GPUs: accelerate would train plain DDP without a word. Launch with "
        f"{CONFIGS}/ddp.yaml (several processes) or {CONFIGS}/cpu.yaml"
    )


def sharded_quantised_weights(strategy: Strategy, model_args: ModelArguments) -> str | None:
    """Quantised weights under ZeRO-3."""
    quantised = model_args.load_in_4bit or model_args.load_in_8bit
    if not quantised or not strategy.is_deepspeed or not strategy.shards_weights:
        return None
    return (
        "ZeRO-3 cannot shard quantised weights, each GPU would load the whole model or fail (peft#2016, "
        f"transformers#24395): launch with {CONFIGS}/ddp.yaml, since a 4-bit 7B model takes 5 GB on each GPU, with "
        f"{CONFIGS}/fsdp2.yaml to shard it, or set load_in_4bit: false"
    )


def fsdp_of_8_bits(strategy: Strategy, model_args: ModelArguments) -> str | None:
    """8-bit weights under FSDP2."""
    if not model_args.load_in_8bit or not strategy.is_fsdp:
        return None
    return f"FSDP2 cannot shard 8-bit weights: set load_in_4bit: true instead, or launch with {CONFIGS}/ddp.yaml"


def fsdp_of_4_bits_in_few(strategy: Strategy, model_args: ModelArguments) -> str | None:
    """4-bit weights under FSDP2 that are stored in 16 bits or fewer."""
    if not model_args.load_in_4bit or not strategy.is_fsdp or model_args.bnb_4bit_quant_storage == "float32":
        return None
    return (
        "FSDP2 shards 4-bit weights only when they are stored as floating-point numbers, and changes one in a thousand "
        "of those stored in 16 bits (bitsandbytes#1945): set bnb_4bit_quant_storage: float32, which is "
        f"{model_args.bnb_4bit_quant_storage or 'uint8'}"
    )


def quantised_weights_trained_in_full(model_args: ModelArguments, *, adapts: bool) -> str | None:
    """Quantised weights and no LoRA."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit) or adapts:
        return None
    return "quantised weights cannot be trained in full: set load_in_4bit: false, or a part to lora"


def checkpointing_of(training_args: TrainingArguments) -> dict:
    """`gradient_checkpointing_kwargs` where activations are checkpointed; else empty."""
    return (training_args.gradient_checkpointing_kwargs or {}) if training_args.gradient_checkpointing else {}


def checkpointing_without_reentrance(
    strategy: Strategy, training_args: TrainingArguments, *, adapts: bool
) -> str | None:
    """`use_reentrant: false` of LoRA under ZeRO-3."""
    sharded = strategy.is_deepspeed and strategy.shards_weights
    if not adapts or checkpointing_of(training_args).get("use_reentrant") is not False or not sharded:
        return None
    return (
        "use_reentrant: false of LoRA under ZeRO-3 would be turned into true by TRL (trl#2514): remove use_reentrant "
        "from gradient_checkpointing_kwargs, and checkpointing is not reentrant; each layer is all-gathered at once, which "
        "that needs"
    )


def reentrant_checkpointing(strategy: Strategy, training_args: TrainingArguments, *, adapts: bool) -> str | None:
    """`use_reentrant: true` of LoRA under DDP."""
    if not adapts or not checkpointing_of(training_args).get("use_reentrant") or not strategy.is_ddp:
        return None
    return (
        "reentrant checkpointing of LoRA under DDP fails with 'marked ready twice' (trl#921, peft#313): remove "
        "use_reentrant from gradient_checkpointing_kwargs"
    )


def selective_checkpointing(training_args: TrainingArguments) -> str | None:
    """`selective` of gradient_checkpointing_kwargs."""
    if not checkpointing_of(training_args).get("selective"):
        return None
    return (
        "selective checkpointing stops at the first step: TRL 1.16 looks for it where transformers 5.23 no longer does, "
        "and PyTorch does not know it. Remove selective from gradient_checkpointing_kwargs; checkpoint_layers says how "
        "much is computed again"
    )


def fsdp_of_bitsandbytes_optimizer(strategy: Strategy, training_args: TrainingArguments) -> str | None:
    """An optimizer of bitsandbytes under FSDP2."""
    if not strategy.is_fsdp or not training_args.optim.value.startswith(BITSANDBYTES_OPTIMIZERS):
        return None
    return (
        f"optim: {training_args.optim.value} is one of bitsandbytes, which cannot step weights that FSDP2 shards "
        "(bitsandbytes#1633: illegal memory access): set optim: adamw_torch"
    )


def offloaded_optimizer(strategy: Strategy, training_args: TrainingArguments) -> str | None:
    """An optimizer that stays on the GPU where the launch offloads it."""
    offloads = strategy.is_deepspeed and "optimizer" in strategy.offloads
    if not offloads or training_args.optim.value.startswith("adamw_torch"):
        return None
    return (
        f"optim: {training_args.optim.value} keeps its state on the GPU, but this launch offloads the optimizer to "
        f"main memory: set optim: adamw_torch, or launch with {CONFIGS}/deepspeed_zero3.yaml"
    )


# Rows without an image


def image_problems(script_args: ScriptArguments, training_args: TrainingArguments, rows: Dataset) -> list[str]:
    """Rows without an image among those with one, against how this launch divides the work."""
    without = rows_without_image(rows)
    sees = {script_args.projector, script_args.vision_tower} != {"frozen"}
    # Where DeepSpeed or FSDP2 divide the work, such rows see an empty picture (`distributed/empty_picture.py`).
    if without and sees and Strategy.from_environment().is_ddp and not training_args.ddp_find_unused_parameters:
        return [
            f"{without} of {len(rows)} training rows have no image. A batch of them leaves the projector or the vision tower "
            "without gradient, and DDP then stops with 'Expected to have finished reduction' (LlamaFactory#6376): remove "
            "ddp_find_unused_parameters: false"
        ]
    return []


def rows_without_image(rows: Dataset) -> int:
    """How many rows of a vision dataset carry no image; no picture is decoded. 0 for a text dataset."""
    if "images" not in rows.column_names:
        return 0
    lengths = pc.list_value_length(rows.data.column("images"))
    if rows._indices is not None:  # of a selection the table still holds all
        lengths = lengths.take(rows._indices.column(0))
    return pc.sum(pc.equal(lengths, 0)).as_py() or 0


def searches_unused_parameters(script_args: ScriptArguments, training_args: TrainingArguments, rows: Dataset) -> bool:
    """`ddp_find_unused_parameters` of the recipe; where it is silent, whether a batch may leave a parameter out.

    To search costs DDP a walk over the whole graph at every step. Only a batch without a single image leaves something
    out, and only what sees the image. TRL searches for every vision model, transformers where nothing is checkpointed.
    """
    if training_args.ddp_find_unused_parameters is not None:
        return training_args.ddp_find_unused_parameters
    sees = {script_args.projector, script_args.vision_tower} - {"frozen"}
    return bool(sees) and rows_without_image(rows) > 0
