"""A few steps of the sample's recipe, and its model, in this process."""

from pathlib import Path

import train_llava
from conftest import ROOT
from transformers import LlavaForConditionalGeneration

from finetuning.arguments import parse_arguments

SAMPLE = ROOT / "scripts" / "configs" / "llava_sample.yaml"
GEMMA_SAMPLE = ROOT / "scripts" / "configs" / "gemma_sample.yaml"


def train(model: Path, dataset: Path, output: Path, *flags: str) -> Path:
    """Four steps of the sample's recipe in this process."""
    common = ["--model_name_or_path", str(model), "--dataset_name", str(dataset), "--output_dir", str(output)]
    common += [
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
    ]
    train_llava.main(*parse_arguments(SAMPLE, [*common, *flags]))
    return output


def build(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder)
