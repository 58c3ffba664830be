"""A run's adapter merged into its base, saved, loaded again and asked the same as base + adapter."""

import gc
import shutil
from pathlib import Path

import psutil
import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
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
from finetuning.manifest import files_in, follow_umask, write_manifest
from finetuning.model_card import write_model_card
from finetuning.models.loading import check_adapter_is_complete, load_base_model, load_for_inference
from finetuning.models.processing import follow_tiles, load_config, load_saved_processing_class
from finetuning.models.published_names import publish
from finetuning.run_folder import adapter_base, find_again
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
        changes = refuse_changed_run(run, arguments, adapter_base(run), data, accept_changes=accept_changes)
        accepted = {"accepted_changes": changes} if changes else {}
        return merge_alone(run, output, arguments, dtype_name, rows, max_shard_size, accepted)


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
    model = PeftModel.from_pretrained(model, run).eval()
    for part in model.modules():
        if isinstance(part, ModulesToSaveWrapper):  # saved as the fp32 masters of training; LoRA is computed in fp32
            part.to(dtype)
    return model


def merge_alone(
    run: Path,
    output: Path,
    arguments: dict,
    dtype_name: str | None,
    rows: int,
    max_shard_size: str,
    accepted: dict[str, list[str]],
) -> dict:
    # Whether it can be merged: before any weights are loaded
    adapter = PeftConfig.from_pretrained(run)
    check_adapter_is_complete(run, adapter.modules_to_save or [])
    base, revision = adapter_base(run), arguments.get("model_revision", "main")
    config = load_config(base, revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: this base is stored quantised, and merging into it would lose what was trained")
    dtype = getattr(torch, dtype_name) if dtype_name else dtype_of_run(arguments)
    device = where_it_fits(output, num_weights(config) * dtype.itemsize)
    processing_class = load_saved_processing_class(run)
    probes = make_probes(is_vision(config), find_again(run, arguments.get("dataset_name", "")) or None, rows)

    # Base + adapter, as it should be; and the base alone
    model = load_with_adapter(run, base, dtype, device, revision)
    follow_tiles(model.config, processing_class)
    tuned = observe(model, processing_class, probes, description="Asking base + adapter")
    with model.disable_adapter():
        untuned = observe(model, processing_class, probes, description="Asking the base", follow=tuned)

    # Merge and save; what is not proven does not stay
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model, changes = merge_in_place(model)
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        processing_class.chat_template = without_training_marks(processing_class.chat_template)
        processing_class.save_pretrained(unfinished)
        publish(unfinished)
        # llama.cpp's converter reads the sentencepiece model, which transformers no longer saves.
        vocabulary = cached_file(
            base, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if vocabulary:
            shutil.copyfile(vocabulary, unfinished / "tokenizer.model")
        del model
        gc.collect()

        # Proof: what lies on disk, asked the same
        model = load_base_model(str(unfinished), dtype=dtype, device_map={"": device}).eval()
        reloaded = load_saved_processing_class(unfinished)
        merged = observe(model, reloaded, probes, description="Asking the merged model", follow=tuned)
        del model
        gc.collect()
        report = {
            "run": str(run),
            "base_model": base,
            "base_revision": revision,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            **accepted,
            **changes,
            "tolerance": {"mean_kl": TOLERANCE[str(dtype).removeprefix("torch.")], "share_of_training": LARGEST_SHARE},
            "base_against_tuned": compare_observations(tuned, untuned),
            "merged_against_tuned": compare_observations(tuned, merged),
            "answers": answers_of(probes, untuned, tuned, merged),
        }
        check_proof(report)
        if arguments.get("load_in_4bit") or arguments.get("load_in_8bit"):
            model, _ = load_for_inference(str(run), dtype=dtype)
            trained = observe(model, processing_class, probes, description="Asking as trained (4 bits)", follow=tuned)
            report["quantised_run_against_merged"] = compare_observations(merged, trained)
        write_merge_report(unfinished, report)
        write_model_card(unfinished, run, report)
        follow_umask(files_in(unfinished))
        write_manifest(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report
