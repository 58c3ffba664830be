"""What a training step costs the host, with all that `upstream` changes and without some of it.

As a script, under `accelerate launch`: `step_costs.py MODEL DATASET OUTPUT NAMES...` trains once without the NAMES of each
argument (`train,named_parameters`), then once with all, and prints the costs as JSON. bf16, as on a GPU: most of what is
saved for DeepSpeed is for it.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration, PreTrainedModel, TrainerCallback

from finetuning.arguments import parse_arguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.data.dataset import open_dataset
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.training.prepare_model import prepare_model
from finetuning.training.trainer import FineTuningTrainer
from support.switched_off import without

SAMPLE = Path(__file__).parents[2] / "scripts" / "configs" / "llava_sample.yaml"


class Costs(TorchDispatchMode, TrainerCallback):
    """How often torch's operations ran in the last step, and functions that walk through all modules or parameters."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.counts: Counter = Counter()
        for owner, name in (
            (torch.nn.Module, "_named_members"),
            (torch.nn.Module, "train"),
            (PreTrainedModel, "num_parameters"),
        ):
            patch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name, function):
        def call(*args, **kwargs):
            self.counts[name] += 1
            return function(*args, **kwargs)

        return call  # not a method, so that `self` comes with the arguments

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.counts.clear()
            self.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.__exit__(None, None, None)
            self.of_last_step = dict(self.counts)


def sample_trainer(model_folder: Path, dataset: Path, output: Path, *flags: str) -> FineTuningTrainer:
    """The trainer of the sample's recipe for three steps, with its model prepared."""
    script_args, args, model_args = parse_arguments(SAMPLE, [
        *("--max_steps", "3", "--logging_steps", "3", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--report_to", "none", "--output_dir", str(output), *flags),
    ])  # fmt: skip
    args.remove_unused_columns = False
    processor = load_processing_class(str(model_folder))
    model = set_trainable(LlavaForConditionalGeneration.from_pretrained(model_folder), script_args, model_args)
    prepare_model(model, script_args, args)
    return FineTuningTrainer(
        model=model, args=args, train_dataset=open_dataset(str(dataset), vision=True)["train"], processing_class=processor,
        data_collator=LlavaDataCollator(processor), checkpoint_layers=script_args.checkpoint_layers,
    )  # fmt: skip


def costs_of_a_step(model_folder: Path, dataset: Path, output: Path, *names: str) -> dict[str, int]:
    """Costs of the third step of a training without these names."""
    with without(*names), pytest.MonkeyPatch.context() as patch:
        for module in (stage_1_and_2, stage3):  # `upstream` changes it for the whole process
            patch.setattr(module, "is_invalid_grad_norm", module.is_invalid_grad_norm)
        trainer = sample_trainer(model_folder, dataset, output)
        costs = Costs(patch)
        trainer.add_callback(costs)
        trainer.train()
    return costs.of_last_step


if __name__ == "__main__":
    *folders, output, names = *map(Path, sys.argv[1:4]), sys.argv[4:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetuning.arguments.choose_precision", lambda *asked: (False, True))
        found = {each: costs_of_a_step(*folders, output, *filter(None, each.split(","))) for each in [*names, ""]}
    print("COSTS", json.dumps(found))
