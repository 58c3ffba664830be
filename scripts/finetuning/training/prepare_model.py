"""Changes to the model between loading and training, in order: fused kernels, the strategy's set-up, the shared prefix."""

from pathlib import Path

from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.arguments import ScriptArguments, TrainingArguments
from finetuning.distributed.deepspeed_zero import set_up_deepspeed
from finetuning.distributed.empty_picture import see_an_empty_picture
from finetuning.distributed.fsdp2 import set_up_fsdp2
from finetuning.distributed.layers_only import shard_layers_only
from finetuning.kernels.fp8_backward import pass_gradients_in_fp8
from finetuning.kernels.lora_layers import fuse_lora, stack_4bit_weights
from finetuning.kernels.model_patches import (
    count_image_tokens_once,
    ignore_right_padding,
    vision_tower_without_autocast,
)
from finetuning.kernels.shared_prefix_attention import enable_shared_prefix
from finetuning.strategy import Strategy
from finetuning.training.int8_products import hold_in_int8


def prepare_model(
    model: nn.Module,
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    *,
    rows: Dataset | None = None,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    shares_prefix: bool = False,
    lacks_pictures: bool = False,
) -> str:
    """Change `model` in place, after `set_trainable` and before the Trainer exists. Returns a line for the log.

    ZeRO and FSDP2 depend on it: it names what they wrap, shards frozen layers and completes DeepSpeed's configuration.
    Fused LoRA rounds once where PEFT rounds twice, so losses in 16 bits differ in the last digits from those of
    `fused_lora: false`. `rows` and `processing_class` are needed where `base_precision` is int8, whose cost is measured on
    a few rows. `lacks_pictures`: some batches may have no picture. FP8 costs some precision of the gradients, INT8 of the
    products. The other patches compute the same.
    """
    # Kernels
    held = ""
    if script_args.base_precision == "int8":
        number, cost = hold_in_int8(model, Path(training_args.output_dir), rows, processing_class)
        held = f"; {number} base layers in INT8, which {cost}"
    fused = fuse_lora(model, sharded=Strategy.from_environment().shards_weights) if script_args.fused_lora else 0
    stack_4bit_weights(model)
    in_fp8 = pass_gradients_in_fp8(model) if script_args.base_precision else 0
    ignore_right_padding(model)
    vision_tower_without_autocast(model)
    count_image_tokens_once(model)

    # Strategy
    strategy = Strategy.from_environment()
    if lacks_pictures and (strategy.shards_weights or strategy.is_deepspeed):
        see_an_empty_picture(model)
    ours = shard_layers_only(model, training_args)
    if strategy.is_fsdp and not ours:
        set_up_fsdp2(model)
    if training_args.deepspeed_plugin is not None:
        set_up_deepspeed(model, training_args.deepspeed_plugin.deepspeed_config)

    # Shared prefix
    if shares_prefix:
        enable_shared_prefix(model)

    shared = "; dialogues about one image train as one sequence" if shares_prefix else ""
    passed = f"; gradients pass through the weights of {in_fp8} layers in FP8" if in_fp8 else ""
    # DoRA with dropout, 8 bits, and what a sharding strategy leaves out of decoder layers.
    others = sum(isinstance(module, LoraLayer) for module in model.modules()) - fused
    by_peft = f", {others} by PEFT's own code" if others else ""
    return f"  {fused} LoRA layers computed in one piece{by_peft}{held}{passed}{shared}"
