"""Merge a run's adapter into its base, and prove that the merged model is what was trained.

    python scripts/merge_adapter.py --run outputs/llava-sample --output models/llava-sample-merged

The base is reloaded in 16 bits (the run's precision; never in 4 bits), merged layer by layer, saved with its processor
and template, loaded again from disk, and asked the same questions as base + adapter: logits and greedy answers must
agree within rounding, else nothing is left behind. merge_report.json holds the numbers. Memory: the model once, and one
layer. For a QLoRA run the report also says how far the merged model is from the one that was trained, whose base was in
4 bits. scripts/push_to_hub.py uploads the folder, with its model card.
"""

import argparse
import shlex
from pathlib import Path

from finetuning import command, start
from finetuning.flags import Parser, add_accept_changes, nearest_path
from finetuning.run_folder import adapter_base, is_unfinished, read_arguments


def check_inputs(run: Path, output: Path) -> dict:
    """The run's arguments. Raises ValueError that lists all that is wrong with the two folders."""
    problems = []
    arguments = read_arguments(run) or {}
    if not run.is_dir():
        problems.append(f"--run {run}: no such folder{nearest_path(run)}")
    elif (run / "config.json").is_file():
        problems.append(f"--run {run}: holds full weights, there is nothing to merge: use it as it is")
    elif not (run / "adapter_model.safetensors").is_file() or not arguments:
        problems.append(
            f"--run {run}: no finished run with an adapter here (adapter_model.safetensors, arguments.yaml)"
        )
    elif is_unfinished(run):
        problems.append(f"--run {run}: training has not ended here; the command that began it continues it")
    if output.exists():
        problems.append(f"--output {output} exists and is never overwritten: delete it or choose another folder")
    if problems:
        raise ValueError("; ".join(problems))
    return arguments


def main(options: argparse.Namespace) -> None:
    """Merge, prove, and say what was found. Raises ValueError where a folder is wrong or the merge is not proven."""
    arguments = check_inputs(options.run, options.output)
    start.prepare(adapter_base(options.run))
    from finetuning.export.merge_run import merge  # PyTorch comes with it: once there is something to merge

    start.imported()
    report = merge(
        options.run,
        options.output,
        arguments,
        dtype_name=options.dtype,
        rows=options.rows,
        max_shard_size=options.max_shard_size,
        accept_changes=options.accept_changes,
    )
    print(f"{describe(report)}\nMerged model, report and card: {options.output}")
    folder = shlex.quote(str(options.output))
    print(f"Ask it:  python scripts/generate.py --model {folder} --question ...")
    print(f"Upload:  python scripts/push_to_hub.py {folder} --repo_id NAME")


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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run, such as outputs/llava-qlora")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as models/llava-merged")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="type of the merged weights (the run's precision)"
    )
    parser.add_argument("--rows", type=int, default=4, help="held-out rows of the run's dataset to compare on")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file of the merged model")
    add_accept_changes(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()))
