"""The least that each GPU must hold before it sees a row: weights, gradients and the optimizer's state.

Per trained number, in bytes: weight 4, gradient 4, AdamW 8; under DeepSpeed 2, 2, and 4 + 8 with its fp32 master (ZeRO,
arXiv 1910.02054, section 3.1). A strategy shards some of it over the processes. Activations come on top, and depend
on rows, layers and kernels: `training.activation_checkpointing` measures them in the first step, nothing is guessed.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.families import is_vision
from finetuning.models.parts import count_parameters, part_of
from finetuning.models.trainable import set_trainable
from finetuning.strategy import CONFIGS, Strategy

GIB = 2**30
MOST_PROCESSES = 64  # of the launches that are proposed


@dataclass(frozen=True)
class Job:
    """What is trained, how it is held, and how it is launched."""

    trained: int  # numbers
    frozen: int  # numbers, of which `quantisable` can be quantised
    quantisable: int
    is_lora: bool
    strategy: Strategy
    bits: int | None = None  # 4 or 8: of what can be quantised, where it is
    dtype: str = "auto"  # of the other weights, as the recipe has it
    optimizer_bytes: int = 8  # per trained number, on the GPU


def count_numbers(model: nn.Module) -> dict[str, int]:
    """`trained`, `frozen` and `quantisable` numbers of a placed model, which may be on the meta device."""
    counts = count_parameters(model).values()
    trained = sum(part["trainable"] for part in counts)
    quantisable = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name) == "language_model"
        and not module.weight.requires_grad
        and "lm_head" not in name
    )
    return {"trained": trained, "frozen": sum(part["total"] for part in counts) - trained, "quantisable": quantisable}


def bytes_of_optimizer(name: str) -> int:
    """A trained number's share of the state that `optim: name` keeps: of Adam two numbers; 0 of what is not known here."""
    if not name.removeprefix("paged_").startswith("adamw"):
        return 0
    return next((size for kind, size in {"4bit": 1, "8bit": 2, "anyprecision": 4}.items() if kind in name), 8)


def place_without_weights(
    config: PreTrainedConfig, script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> nn.Module:
    """The model as it will be placed, on the meta device. Raises ValueError where the placement cannot be had."""
    auto_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    unset_hf_deepspeed_config()  # under ZeRO-3 transformers would shard even these weights, which do not exist
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
        bits=bits_of(model_args, script_args.base_precision),
        dtype=model_args.dtype,
        # Pages of the optimizer's state may lie in main memory.
        optimizer_bytes=0 if optim.startswith("paged") else bytes_of_optimizer(optim),
    )


def bits_of(model_args: ModelArguments, base_precision: str | None) -> int | None:
    """Of a base that is stored in fewer than 16. INT8 takes as much as 16 bits: a copy is kept for gradients."""
    if base_precision == "int8":
        return None
    return 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None


def least_memory(job: Job) -> dict[str, float]:
    """Bytes on each GPU of `weights`, `gradients` and `optimizer`."""
    deepspeed = job.strategy.is_deepspeed
    # Without LoRA all weights are loaded in fp32, unless DeepSpeed keeps masters of those that are trained.
    in_fp32 = job.dtype == "float32" or (job.dtype == "auto" and not job.is_lora and not deepspeed)
    width = 4 if in_fp32 else 2
    # A 4-bit number has a 64th of its block's scale, which takes a byte or four.
    quantised_width = {4: 0.5 + 1 / 64, 8: 1}.get(job.bits, width)
    frozen = job.quantisable * quantised_width + (job.frozen - job.quantisable) * width
    needs = {
        "weights": frozen + job.trained * (2 if deepspeed else 4),
        "gradients": job.trained * (2 if deepspeed else 4),
        "optimizer": job.trained * (job.optimizer_bytes + (4 if deepspeed else 0)),
    }
    for name in job.strategy.shards:
        needs[name] /= job.strategy.num_processes
    # Gradients go where the optimizer is.
    offloads = job.strategy.offloads
    away = [*offloads, *(["gradients"] if "optimizer" in offloads else [])]
    return needs | dict.fromkeys(away, 0.0)


def memory_problems(job: Job, gpu_memory: int | None) -> list[str]:
    """Why `gpu_memory` (bytes of the smallest GPU, None without one) cannot do, and what would."""
    if gpu_memory is None or fits(job, gpu_memory):
        return []
    needs = least_memory(job)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
    return [
        f"memory: each GPU must hold at least {sum(needs.values()) / GIB:.1f} GiB before it sees a row ({parts}), and has "
        f"{gpu_memory / GIB:.1f}: {', or '.join(ways_out(job, gpu_memory))}"
    ]


def main_memory_problems(job: Job, main_memory: int, processes: int, *, on_gpu: bool) -> list[str]:
    """Why `main_memory` (bytes of this machine) cannot hold what its `processes` keep there: what is offloaded, or all on a CPU."""
    strategy = job.strategy
    needs = least_memory(replace(job, strategy=replace(strategy, offloads=())))
    kept = needs
    if on_gpu:
        away = {*strategy.offloads, *(["gradients"] if "optimizer" in strategy.offloads else [])}
        kept = {name: size for name, size in needs.items() if name in away}
    needed = processes * sum(kept.values())
    if needed <= main_memory:
        return []
    parts = ", ".join(f"{name} {processes * size / GIB:.1f}" for name, size in kept.items())
    way = "launch without offload, or on more machines" if on_gpu else "train on a GPU, or take a smaller model"
    return [
        f"main memory: this machine's {processes} process{'es' if processes > 1 else ''} must hold at least "
        f"{needed / GIB:.1f} GiB there ({parts}), and it has {main_memory / GIB:.1f}: {way}"
    ]


def ways_out(job: Job, gpu_memory: int) -> list[str]:
    """What would fit, the least change first."""
    ways = []
    if job.is_lora and job.bits != 4 and fits(replace(job, bits=4, strategy=Strategy("DDP")), gpu_memory):
        ways.append("set load_in_4bit: true")
    # What is quantised is sharded by FSDP2 alone, and only in 4 bits; anything else DeepSpeed does faster.
    for file in {4: ["fsdp2"], None: ["deepspeed_zero2", "deepspeed_zero3"]}.get(job.bits, []):
        sharded = Strategy.from_file(file)
        numbers = range(max(job.strategy.num_processes, 2), MOST_PROCESSES + 1)
        enough = [
            number
            for number in numbers
            if fits(replace(job, strategy=replace(sharded, num_processes=number)), gpu_memory)
        ]
        if enough:
            ways.append(f"launch with {CONFIGS}/{file}.yaml on {enough[0]} GPUs")
    if job.bits is None and len(job.strategy.offloads) < 2:
        ways.append(f"launch with {CONFIGS}/deepspeed_zero3_offload.yaml")
    return ways or ["take larger GPUs"]


def fits(job: Job, gpu_memory: int) -> bool:
    """Whether the least memory of a job is within `gpu_memory` bytes."""
    return sum(least_memory(job).values()) <= gpu_memory
