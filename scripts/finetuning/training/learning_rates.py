"""A learning rate of its own for the projector, the vision tower, and LoRA's B matrices.

LLaVA's recipe trains its projector with a tenth of LoRA's rate (github.com/haotian-liu/LLaVA, finetune_lora.sh). LoRA+ gives B
a multiple of A's rate (arXiv 2402.12354). The scheduler scales all alike.
"""

from typing import Any

import torch

from finetuning import upstream
from finetuning.arguments import TrainingArguments
from finetuning.models.parts import part_of
from finetuning.training.validation_loss import ValidationLossTrainer

# What a group of parameters is called in the log, where its rate is another than `learning_rate`.
LABEL = "label"


@upstream.overrides
class LearningRatesTrainer(ValidationLossTrainer):
    """SFTTrainer whose optimizer has a group for each learning rate, which every log names."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        names = {id(parameter): name for name, parameter in (model or self.model).named_parameters()}
        divide_groups(optimizer, names, self.args)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            rates = {group[LABEL]: group["lr"] for group in self.optimizer.param_groups if group.get(LABEL)}
            logs |= {f"learning_rate/{label}": float(rate) for label, rate in rates.items()}
        super().log(logs, start_time)


def rate_of(name: str, args: TrainingArguments) -> tuple[str, float]:
    """(label, learning rate) of a trained parameter by its full name; the label is empty for `learning_rate` itself."""
    part = part_of(name)
    own = {"projector": args.learning_rate_projector, "vision_tower": args.learning_rate_vision_tower}.get(part)
    label, rate = (part, own) if own is not None else ("", args.learning_rate)
    # Only B: PEFT's create_loraplus_optimizer would also give the ratio to every bias and norm that is trained in full.
    if args.lora_plus_ratio is not None and ".lora_B." in name:
        label, rate = f"{label}_lora_b".removeprefix("_"), rate * args.lora_plus_ratio
    return label, rate


def divide_groups(optimizer: torch.optim.Optimizer, names: dict[int, str], args: TrainingArguments) -> None:
    """Divide the optimizer's groups by learning rate, in place, before its first step. `names`: id of a parameter -> name."""
    if all(
        rate is None for rate in (args.learning_rate_projector, args.learning_rate_vision_tower, args.lora_plus_ratio)
    ):
        return
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            label, rate = rate_of(names[id(parameter)], args)
            new = group | {"params": [], "lr": rate, LABEL: label}
            groups.setdefault((label, number), new)["params"].append(parameter)
    # The log's learning_rate is the first group's.
    optimizer.param_groups[:] = [groups[key] for key in sorted(groups)]
