"""A few steps of the sample's recipe, and its model, in this process."""

import shutil
from pathlib import Path

import torch
import train_llava
from conftest import ROOT
from merge_adapter import check_inputs
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from finetuning.arguments import parse_arguments
from finetuning.export.merge_run import merge

SAMPLE = ROOT / "scripts" / "configs" / "llava_sample.yaml"
GEMMA_SAMPLE = ROOT / "scripts" / "configs" / "gemma_sample.yaml"


def folders(model: Path, dataset: Path, output: Path) -> list[str]:
    """The flags that every training needs."""
    return ["--model_name_or_path", str(model), "--dataset_name", str(dataset), "--output_dir", str(output)]


def train(model: Path, dataset: Path, output: Path, *flags: str) -> Path:
    """Four steps of the sample's recipe in this process."""
    short = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no"]
    train_llava.main(*parse_arguments(SAMPLE, [*folders(model, dataset, output), *short, *flags]))
    return output


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a run of four steps as if it had been ended behind its checkpoint of step 2."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoint-4", *copy.glob("*.safetensors"), copy / "metrics.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def assert_equal_adapters(*runs: Path) -> None:
    """The adapters of two runs are equal to the bit."""
    weights, expected = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def merge_with_proof(run: Path, output: Path) -> dict:
    """The report of a merge in fp32."""
    arguments = check_inputs(run, output)
    report = merge(run, output, arguments, dtype_name="float32", rows=2, max_shard_size="5GB")
    assert report["merged_against_tuned"]["equal_answers"] == len(report["answers"])
    return report


def build(folder: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder)
