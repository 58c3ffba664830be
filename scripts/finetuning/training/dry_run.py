"""`--dry_run`: all that a training does before its weights are loaded, and the first forward pass, without numbers."""

from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig

from finetuning import upstream
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.kernels.model_patches import ignore_right_padding
from finetuning.models.loading import is_vision
from finetuning.models.parts import base_model_of
from finetuning.models.trainable import describe_trainable
from finetuning.preflight.memory import place_without_weights
from finetuning.training.activation_checkpointing import longest_rows

TRIED = ("llava", "vipllava", "gemma", "gemma2")  # whose forward pass asks no number of its input


def dry_run(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    train_rows: Dataset,
    processing_class: Any,
) -> None:
    """Place the model on the meta device, pass the longest batch through it, and print what came of it.

    Writes nothing, loads no weights. Raises ValueError, as training would, for rows or a placement that cannot be.
    """
    model = place_without_weights(config, script_args, training_args, model_args)
    numbers = longest_rows(train_rows, training_args.per_device_train_batch_size)
    rows = [train_rows[number] for number in numbers]
    if is_vision(config):
        batch = LlavaDataCollator(processing_class, training_args.pad_to_multiple_of, config)(rows)
    else:
        batch = processing_class.apply_chat_template(
            [row["messages"] for row in rows], tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
    shape = tuple(batch["input_ids"].shape)
    lines = [describe_trainable(model), f"  longest batch: {shape[0]} rows of {shape[1]} tokens, all pictures opened"]
    if config.model_type in TRIED:
        logits = tuple(forward_without_numbers(model, batch).shape)
        lines.append(f"  forward pass on the meta device: logits {logits}")
    else:
        lines.append(f"  no forward pass on the meta device: a {config.model_type} asks for numbers of its input")
    if training_args.use_cpu:
        lines.append("  no GPU here to plan for: scripts/plan.py --gpu plans for one that is elsewhere")
    lines.append("  dry run: nothing was written, and no weight was loaded; without --dry_run this trains")
    PartialState().print("\n".join(lines))


def forward_without_numbers(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The logits (rows, tokens, vocabulary) of a model on the meta device, as shape and dtype."""
    ignore_right_padding(model)
    inner = base_model_of(model).model
    if hasattr(inner, "get_placeholder_mask"):

        def image_tokens(input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
            return (input_ids == inner.config.image_token_id).unsqueeze(-1)

        # transformers compares the numbers of image tokens and features, which the collator has done.
        upstream.replace(inner, "get_placeholder_mask", image_tokens)
    names = ("input_ids", "attention_mask", "pixel_values")
    inputs = {name: batch[name].to("meta") for name in names if name in batch}
    return model.train()(**inputs, use_cache=False).logits
