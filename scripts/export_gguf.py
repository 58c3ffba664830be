"""Export a merged model for llama.cpp, and prove that llama.cpp answers as the merged model does.

    python scripts/export_gguf.py --model models/llava-merged --dataset data/cctv --llama_cpp ../llama.cpp \
        --output models/llava-gguf

Writes the language model as model-f16.gguf and in the types of --types (Q8_0 and Q4_K_M), and a LLaVA's vision tower and
projector as mmproj-f16.gguf. Then llama.cpp's own server is asked questions of a held-out split, pictures as a client
sends them. Answers, log-probabilities and scores of each file stand beside the merged model's in export_report.json.
Where fewer than 96 % of the answers of f16 are the merged model's, nothing is left behind.

--llama_cpp is a checkout of https://github.com/ggml-org/llama.cpp that was built there:
cmake -B build && cmake --build build --target llama-quantize llama-server
"""

import argparse
from pathlib import Path

from finetuning import command
from finetuning.flags import Parser, positive
from finetuning.model_files import config_of


def check_inputs(options: argparse.Namespace) -> bool:
    """Whether the model reads pictures. Raises ValueError that lists all that is wrong with the folders."""
    problems = []
    config = None
    if (options.model / "adapter_config.json").is_file():
        problems.append(
            f"--model {options.model}: an adapter: merge it first (python scripts/merge_adapter.py --run {options.model} "
            "--output models/merged)"
        )
    elif (config := config_of(str(options.model))) is None or not list(options.model.glob("*.safetensors")):
        problems.append(f"--model {options.model}: no model folder (config.json, *.safetensors)")
    elif not (options.model / "chat_template.jinja").is_file():
        problems.append(f"--model {options.model}: no chat_template.jinja: export what merge_adapter.py wrote")
    if config is not None and "vision_config" in config and config["model_type"] != "llava":
        problems.append(
            f"--model {options.model}: a {config['model_type']}; of models that see only LLaVA-1.5's are known"
        )
    if options.output.exists():
        problems.append(
            f"--output {options.output} exists and is never overwritten: delete it or choose another folder"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return config is not None and "vision_config" in config


def main(options: argparse.Namespace) -> dict:
    """Export, prove and say so; the report. Raises ValueError where it cannot be done."""
    vision = check_inputs(options)
    from finetuning.export.gguf_export import export  # PyTorch comes with it: once there is something to export
    from finetuning.export.llama_cpp import find_llama_cpp

    report = export(
        options.model,
        options.output,
        find_llama_cpp(options.llama_cpp, vision=vision),
        dataset_name=options.dataset,
        split=options.split,
        questions=options.questions,
        kinds=options.types,
        max_new_tokens=options.max_new_tokens,
    )
    print(f"{describe(report)}\nExport and report: {options.output}")
    return report


def describe(report: dict) -> str:
    """The report as a table: a line for each file."""
    lines = [f"{'file':<20}{'MB':>8}{'equal answers':>16}{'nats a token':>14}  scores"]
    for found in (report["merged_model"] | {"file": "merged model"}, *report["files"].values()):
        scores = ", ".join(f"{name} {value:.2f}" for name, value in found["scores"].items())
        if "size" not in found:
            lines.append(f"{found['file']:<20}{'':>38}  {scores}")
            continue
        equal = f"{found['equal_answers']} of {found['questions']}"
        lines.append(f"{found['file']:<20}{found['size'] / 1e6:>8.1f}{equal:>16}{found['mean_kl']:>14.1e}  {scores}")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a merged folder, such as models/llava-merged")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as models/llava-gguf")
    parser.add_argument("--llama_cpp", type=Path, required=True, help="a checkout of llama.cpp, built")
    parser.add_argument("--dataset", required=True, help="a prepared dataset to ask questions of, such as data/cctv")
    parser.add_argument("--split", default="test", help="its split (default %(default)s)")
    parser.add_argument("--questions", type=positive, default=50, help="how many, evenly spread (default %(default)s)")
    parser.add_argument("--types", nargs="*", default=["Q8_0", "Q4_K_M"], help="types of llama-quantize beside f16")
    parser.add_argument("--max_new_tokens", type=positive, default=64, help="longest answer, in tokens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()))
