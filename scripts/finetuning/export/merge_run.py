"""A run's adapter merged into its base, saved, loaded again and asked the same as base + adapter."""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from finetuning.export.merging import (
    LARGEST_SHARE,
    TOLERANCE,
    Observation,
    check_proof,
    compare_observations,
    dtype_of_run,
    make_probes,
    merge_in_place,
    num_weights,
    observe,
    without_training_marks,
    write_merge_report,
)
from finetuning.failures import writing
from finetuning.families import is_vision
from finetuning.folder_lock import one_at_a_time
from finetuning.kernels.int8_base import hold_base_in_int8
from finetuning.manifest import made_whole
from finetuning.model_card import write_model_card
from finetuning.models.loading import check_adapter_is_complete, load_base_model, load_for_inference
from finetuning.models.picture_parameters import load_adapter, without_adapter
from finetuning.models.processing import follow_tiles, load_config, load_saved_processing_class
from finetuning.models.published_names import save
from finetuning.run_folder import adapter_base, find_again, read_int8_products
from finetuning.training.origin import refuse_changed_run

GIB = 2**30


def choose_device(num_bytes: int) -> str:
    """A GPU that holds the model with room to run it, else the CPU. Raises ValueError where neither does."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.15 * num_bytes:
        return "cuda"
    available = psutil.virtual_memory().available
    if available < 1.05 * num_bytes:
        raise ValueError(
            f"the base needs {num_bytes / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are free: close other "
            "programs, or merge on a larger machine"
        )
    return "cpu"


@dataclass(frozen=True)
class Parts:
    """What is merged, and how: found before any weights are loaded."""

    base: str
    revision: str
    dtype: torch.dtype
    device: str
    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    probes: list[dict]


def find_parts(run: Path, output: Path, arguments: dict, dtype_name: str | None, rows: int) -> Parts:
    """Base, precision, device and questions of a merge. Raises ValueError where it cannot be done, or does not fit."""
    adapter = PeftConfig.from_pretrained(run)
    check_adapter_is_complete(run, adapter.modules_to_save or [])
    base, revision = adapter_base(run), arguments.get("model_revision", "main")
    config = load_config(base, revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: this base is stored quantised, and merging into it would lose what was trained")
    dtype = getattr(torch, dtype_name) if dtype_name else dtype_of_run(arguments)
    device = where_it_fits(output, num_weights(config) * dtype.itemsize)
    probes = make_probes(is_vision(config), find_again(run, arguments.get("dataset_name", "")) or None, rows)
    return Parts(base, revision, dtype, device, load_saved_processing_class(run), probes)


def answers_of(
    probes: list[dict], untuned: list[Observation], tuned: list[Observation], merged: list[Observation]
) -> list[dict[str, str]]:
    """What base, base + adapter and merged model said to each question, for the report."""
    return [
        {
            "source": probe["source"],
            "question": probe["messages"][-1]["content"],
            "base": without.answer,
            "tuned": with_adapter.answer,
            "merged": after.answer,
        }
        for probe, without, with_adapter, after in zip(probes, untuned, tuned, merged, strict=True)
    ]


def where_it_fits(output: Path, num_bytes: int) -> str:
    """`choose_device`, after a look at the disk. Raises ValueError where memory or disk is too small."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < 1.05 * num_bytes:
        raise ValueError(f"{output}: needs {num_bytes / GIB:.1f} GiB of disk, {free / GIB:.1f} GiB are free")
    return choose_device(num_bytes)


def load_with_adapter(run: Path, base: str, dtype: torch.dtype, device: str, revision: str) -> PeftModel:
    """The base in the dtype of the merge, and the run's adapter on it."""
    model = load_base_model(base, dtype=dtype, device_map={"": device}, revision=revision)
    model = load_adapter(model, run).eval()
    for part in model.modules():
        if isinstance(part, ModulesToSaveWrapper):  # saved as the fp32 masters of training; LoRA is computed in fp32
            part.to(dtype)
    return model


def load_as_trained(run: Path, arguments: dict, dtype: torch.dtype) -> nn.Module | None:
    """The run over its quantised base, as it was trained; None where the base was not quantised."""
    in_int8 = arguments.get("base_precision") == "int8"
    if not (in_int8 or arguments.get("load_in_4bit") or arguments.get("load_in_8bit")):
        return None
    model, _ = load_for_inference(str(run), dtype=dtype)
    if in_int8:
        hold_base_in_int8(model, (read_int8_products(run) or {}).get("in_16_bits", ()))
    return model


def save_merged(model: PeftModel, parts: Parts, folder: Path, max_shard_size: str) -> dict:
    """Merge, and write model, processor and template to `folder`; what `merge_in_place` says of it."""
    merged, changes = merge_in_place(model)
    processing_class = parts.processing_class
    processing_class.chat_template = without_training_marks(processing_class.chat_template)
    save(merged, processing_class, folder, max_shard_size=max_shard_size)
    # llama.cpp's converter reads the sentencepiece model, which transformers no longer saves.
    vocabulary = cached_file(
        parts.base, "tokenizer.model", revision=parts.revision, _raise_exceptions_for_missing_entries=False
    )
    if vocabulary:
        shutil.copyfile(vocabulary, folder / "tokenizer.model")
    return changes


def merge(
    run: Path,
    output: Path,
    arguments: dict,
    *,
    dtype_name: str | None,
    rows: int,
    max_shard_size: str,
    accept_changes: bool = False,
) -> dict:
    """The merged model in `output`, its report and card; `arguments` are the run's. Returns the report.

    Raises ValueError where it does not fit, where another process does it, where run, base or data are not what was
    trained, or where the merge is not proven: nothing is left behind then.
    """
    with one_at_a_time(output, "a merge"), writing(output, SafetensorError):
        data = find_again(run, arguments.get("dataset_name", "")) or None
        accepted = refuse_changed_run(run, adapter_base(run), data, accept_changes=accept_changes)
        parts = find_parts(run, output, arguments, dtype_name, rows)
        place = {"": parts.device}

        # Base + adapter, as it should be; and the base alone
        model = load_with_adapter(run, parts.base, parts.dtype, parts.device, parts.revision)
        follow_tiles(model.config, parts.processing_class)
        tuned = observe(model, parts.processing_class, parts.probes, description="Asking base + adapter")
        with without_adapter(model):
            untuned = observe(model, parts.processing_class, parts.probes, description="Asking the base", follow=tuned)

        # Merge and save; what is not proven does not stay
        with made_whole(output) as folder:
            changes = save_merged(model, parts, folder, max_shard_size)
            del model
            gc.collect()

            # Proof: what lies on disk, asked the same
            model = load_base_model(str(folder), dtype=parts.dtype, device_map=place).eval()
            reloaded = load_saved_processing_class(folder)
            merged = observe(model, reloaded, parts.probes, description="Asking the merged model", follow=tuned)
            del model
            gc.collect()
            precision = str(parts.dtype).removeprefix("torch.")
            report = {
                "run": str(run),
                "base_model": parts.base,
                "base_revision": parts.revision,
                "dtype": precision,
                "device": parts.device,
                **({"accepted_changes": accepted} if accepted else {}),
                **changes,
                "tolerance": {"mean_kl": TOLERANCE[precision], "share_of_training": LARGEST_SHARE},
                "base_against_tuned": compare_observations(tuned, untuned),
                "merged_against_tuned": compare_observations(tuned, merged),
                "answers": answers_of(parts.probes, untuned, tuned, merged),
            }
            check_proof(report)
            model = load_as_trained(run, arguments, parts.dtype)
            if model is not None:
                as_trained = "Asking as trained (quantised)"
                trained = observe(model, parts.processing_class, parts.probes, description=as_trained, follow=tuned)
                report["quantised_run_against_merged"] = compare_observations(merged, trained)
            write_merge_report(folder, report)
            write_model_card(folder, run, report)
    return report
