"""Merge a run's adapter into its base, and prove that the merged model is what was trained.

    python scripts/merge_adapter.py --run outputs/llava-sample --output models/llava-sample-merged

The base is reloaded in 16 bits (the run's precision; never in 4 bits), merged layer by layer, saved with its processor
and template, loaded again from disk, and asked the same questions as base + adapter: logits and greedy answers must
agree within rounding, else nothing is left behind. merge_report.json holds the numbers. Memory: the model once, and one
layer. For a QLoRA run the report also says how far the merged model is from the one that was trained, whose base was in
4 bits. --push_to_hub NAME uploads the folder, with a model card, as a private repository.
"""

import argparse
import sys
from pathlib import Path

from finetuning.run_folder import read_arguments


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
    arguments = check_inputs(run, output)
    from finetuning.export.merge_run import merge  # PyTorch comes with it: once there is something to merge

    return merge(run, output, arguments, dtype_name=dtype_name, rows=rows, max_shard_size=max_shard_size)


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
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="type of the merged weights (the run's precision)"
    )
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
        from huggingface_hub import HfApi

        api = HfApi()
        repository = api.create_repo(options.push_to_hub, private=True, exist_ok=True).repo_id
        print(api.upload_folder(repo_id=repository, folder_path=options.output, commit_message="Merged model"))
