"""Merge a run's adapter into its base, and prove that the merged model is what was trained.

    python scripts/merge_adapter.py --run outputs/llava-sample --output models/llava-sample-merged

The base is reloaded in 16 bits (the run's precision; never in 4 bits), merged layer by layer, saved with its processor
and template, loaded again from disk, and asked the same questions as base + adapter: logits and greedy answers must
agree within rounding, else nothing is left behind. merge_report.json holds the numbers. Memory: the model once, and one
layer. For a QLoRA run the report also says how far the merged model is from the one that was trained, whose base was in
4 bits. --push_to_hub NAME uploads the folder, with a model card, as a private repository.
"""

import argparse
import gc
import shutil
import sys
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers.utils import cached_file

from finetuning.export.merging import (
    LARGEST_SHARE,
    TOLERANCE,
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
from finetuning.export.model_card import write_model_card
from finetuning.folder_lock import one_at_a_time
from finetuning.manifest import files_in, follow_umask, write_manifest
from finetuning.models.loading import (
    check_adapter_is_complete,
    is_vision,
    load_base_model,
    load_config,
    load_for_inference,
    load_saved_processing_class,
)
from finetuning.run_folder import adapter_base, find_again, read_arguments

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


def check_inputs(run: Path, output: Path) -> dict:
    """The run's arguments. Raises ValueError that lists all that is wrong with the two folders."""
    problems = []
    arguments = read_arguments(run) or {}
    if not run.is_dir():
        problems.append(f"--run {run}: no such folder")
    elif (run / "config.json").is_file():
        problems.append(f"--run {run}: holds full weights, there is nothing to merge: use it as it is")
    elif not (run / "adapter_model.safetensors").is_file() or not arguments:
        problems.append(
            f"--run {run}: no finished run with an adapter here (adapter_model.safetensors, arguments.yaml)"
        )
    if output.exists():
        problems.append(f"--output {output} exists and is never overwritten: delete it or choose another folder")
    if problems:
        raise ValueError("; ".join(problems))
    return arguments


def main(run: Path, output: Path, dtype_name: str | None, rows: int, max_shard_size: str) -> dict:
    """Merge, prove and save; the report. Raises ValueError where it cannot be done, or another process does it."""
    with one_at_a_time(output, "a merge"):
        return merge(run, output, dtype_name, rows, max_shard_size)


def merge(run: Path, output: Path, dtype_name: str | None, rows: int, max_shard_size: str) -> dict:
    """Merge a run's adapter into its base, prove it on `rows` questions, save; returns the report."""
    # What will be merged, and whether it can be: before any weights are loaded
    arguments = check_inputs(run, output)
    adapter = PeftConfig.from_pretrained(run)
    check_adapter_is_complete(run, adapter.modules_to_save or [])
    base, revision = adapter_base(run), arguments.get("model_revision", "main")
    config = load_config(base, revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{base}: this base is stored quantised, and merging into it would lose what was trained")
    dtype = getattr(torch, dtype_name) if dtype_name else dtype_of_run(arguments)
    num_bytes = num_weights(config) * dtype.itemsize
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < 1.05 * num_bytes:
        raise ValueError(f"{output}: needs {num_bytes / GIB:.1f} GiB of disk, {free / GIB:.1f} GiB are free")
    device = choose_device(num_bytes)
    processing_class = load_saved_processing_class(run)
    probes = make_probes(is_vision(config), find_again(run, arguments.get("dataset_name", "")) or None, rows)

    # Base + adapter, as it should be; and the base alone
    model = load_base_model(base, dtype=dtype, device_map={"": device}, revision=revision)
    model = PeftModel.from_pretrained(model, run).eval()
    for part in model.modules():
        if isinstance(part, ModulesToSaveWrapper):  # saved as the fp32 masters of training; LoRA is computed in fp32
            part.to(dtype)
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
            **changes,
            "tolerance": {
                "mean_kl": TOLERANCE[str(dtype).removeprefix("torch.")],
                "share_of_training": LARGEST_SHARE,
            },
            "base_against_tuned": compare_observations(tuned, untuned),
            "merged_against_tuned": compare_observations(tuned, merged),
            "answers": [
                {
                    "source": probe["source"],
                    "question": probe["messages"][-1]["content"],
                    "base": without.answer,
                    "tuned": with_adapter.answer,
                    "merged": after.answer,
                }
                for probe, without, with_adapter, after in zip(probes, untuned, tuned, merged, strict=True)
            ],
        }
        check_proof(report)
        if arguments.get("load_in_4bit") or arguments.get("load_in_8bit"):
            model, _ = load_for_inference(str(run), dtype=dtype)
            trained = observe(model, processing_class, probes, description="Asking as trained (4 bits)", follow=tuned)
            report["quantised_run_against_merged"] = compare_observations(merged, trained)
        write_merge_report(unfinished, report)
        write_model_card(unfinished, run, arguments, report)
        follow_umask(files_in(unfinished))
        write_manifest(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def describe(report: dict) -> str:
    """The report in a few lines."""
    merged, base, count = report["merged_against_tuned"], report["base_against_tuned"], len(report["answers"])
    lines = [
        f"{report['adapted_layers']} layers merged in {report['dtype']}, {report['weights_changed']:,} of "
        f"{report['weights_in_them']:,} weights in them changed; whole: {', '.join(report['whole_parts']) or 'none'}",
        f"merged against base + adapter: {merged['mean_kl']:.2e} nats a token (at most "
        f"{report['tolerance']['mean_kl']:.0e}), {merged['equal_answers']} of {count} answers equal",
        f"base against base + adapter:   {base['mean_kl']:.2e} nats a token, {base['equal_answers']} of {count} "
        "answers equal",
    ]
    if drift := report.get("quantised_run_against_merged"):
        lines.append(
            f"merged against the quantised model that was trained: {drift['mean_kl']:.2e} nats a token, "
            f"{drift['equal_answers']} of {count} answers equal; this difference is the quantisation of the base"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, such as outputs/llava-qlora")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as models/llava-merged")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="type of the merged weights (the run's precision)")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows of the run's dataset to compare on")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of the merged model")
    parser.add_argument("--push_to_hub", metavar="NAME", help="also upload to this repository of the Hub (HF_TOKEN)")
    options = parser.parse_args()
    try:
        report = main(options.run, options.output, options.dtype, options.rows, options.max_shard_size)
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print(f"{describe(report)}\nMerged model, report and card: {options.output}")
    if options.push_to_hub:
        api = HfApi()
        repository = api.create_repo(options.push_to_hub, private=True, exist_ok=True).repo_id
        print(api.upload_folder(repo_id=repository, folder_path=options.output, commit_message="Merged model"))
