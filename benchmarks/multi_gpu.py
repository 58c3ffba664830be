"""One recipe under every strategy: rows a second, memory of each GPU, a checkpoint, and a continuation from it.

    python benchmarks/multi_gpu.py --model llava-hf/llava-1.5-7b-hf --work /tmp/multi_gpu --output multi_gpu.json
    python benchmarks/multi_gpu.py --model models/tiny-llava --work /tmp/multi_gpu --output multi_gpu.json --batch_size 2

Only the config and the processor of the model are read: its weights are drawn at random in the published shape and
written to disk, so that every strategy loads them as it would load the real ones. Each strategy trains 11 steps by
`scripts/train_llava.py` with a checkpoint at step 10, loses what came after it, and is started again. The second line
runs on a CPU, where strategies that need GPUs are listed with the reason for which they were refused.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed

ROOT = Path(__file__).parents[1]
STEPS, CHECKPOINT = 11, 10


@dataclass(frozen=True)
class Variant:
    """An accelerate file, the flags of the recipe, and whether it is continued from a checkpoint."""

    config: str
    flags: dict[str, object] = field(default_factory=dict)
    processes: int | None = None
    resumes: bool = True


QLORA = {"load_in_4bit": True}
FULL = {"language_model": "full", "projector": "full", "gradient_checkpointing": True}
VARIANTS = {
    "LoRA, one GPU": Variant("single_gpu", processes=1, resumes=False),
    "LoRA, DDP": Variant("ddp"),
    "LoRA, ZeRO-2": Variant("deepspeed_zero2"),
    "LoRA, ZeRO-3": Variant("deepspeed_zero3"),
    "QLoRA, DDP": Variant("ddp", QLORA),
    "QLoRA, FSDP2": Variant("fsdp2", QLORA | {"bnb_4bit_quant_storage": "bfloat16"}),
    # A checkpoint of 7 billion trained numbers takes 100 GB: only the result is saved.
    "full, ZeRO-3": Variant("deepspeed_zero3", FULL, resumes=False),
    "LoRA, FSDP2": Variant("fsdp2"),
    "LoRA, ZeRO-3, offload": Variant("deepspeed_zero3_offload", {"optim": "adamw_torch"}, resumes=False),
}


def make_model(name: str, folder: Path) -> None:
    config = AutoConfig.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(0)
    # The GPU's memory is given back when this function returns: the runs need all of it.
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    AutoProcessor.from_pretrained(name).save_pretrained(folder)


def make_dataset(folder: Path, num_rows: int) -> None:
    """Grey pictures and one question each: what is seen does not change the speed."""
    drawn = random.Random(0)
    rows = []
    for index in range(num_rows):
        count = drawn.randint(1, 20)
        turns = [("user", "How many people are in view?"), ("assistant", f"There are {count} people in view.")]
        rows.append(
            {
                "messages": [{"role": role, "content": content} for role, content in turns],
                "images": [Picture.new("RGB", (336, 336), (drawn.randint(0, 255),) * 3)],
                "image_id": str(index),
                "count": count,
            }
        )
    turn = {"role": Value("string"), "content": Value("string")}
    features = {"messages": List(turn), "images": List(Image()), "image_id": Value("string"), "count": Value("int64")}
    train = Dataset.from_list(rows, features=Features(features))
    DatasetDict({"train": train, "validation": train.select(range(2))}).save_to_disk(folder)


def launch(variant: Variant, run: Path, args: argparse.Namespace, log: Path) -> tuple[int, float]:
    """Train, or continue; (exit code, seconds)."""
    processes = variant.processes or args.processes
    flags = {
        "config": ROOT / "scripts" / "configs" / "llava_lora.yaml",
        "model_name_or_path": args.work / "model",
        "dataset_name": args.work / "data",
        "output_dir": run,
        "global_batch_size": args.batch_size * processes,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": STEPS,
        "save_steps": CHECKPOINT if variant.resumes else 1000,
        "save_strategy": "steps" if variant.resumes else "no",
        "logging_steps": 5,
        "eval_strategy": "no",
        "lora_dropout": 0.0,
        "gradient_checkpointing": False,
    } | variant.flags
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{variant.config}.yaml")]
    command += ["--num_processes", str(processes), "scripts/train_llava.py", *words]
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        # A single process that sees several GPUs is refused: it would copy the model to all of them at every step.
        seen = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 and torch.cuda.is_available() else {})
        code = subprocess.run(
            command, cwd=ROOT, env=seen, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    return code, time.perf_counter() - started


def measure(variant: Variant, run: Path, args: argparse.Namespace) -> dict[str, object]:
    """Speed over steps 6 to 10, the largest peak of any GPU, whether it saved and continued; or why it did not."""
    log = run.with_suffix(".log")
    code, seconds = launch(variant, run, args, log)
    if code:
        return {"failed": reason(log)}
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    at_10 = next(entry for entry in history if entry.get("step") == CHECKPOINT and "loss" in entry)
    weights = sorted(run.glob("*.safetensors"))
    result = {
        "samples_per_second": at_10["samples_per_second"],
        "peak_memory_gib": at_10.get("peak_memory_gib"),
        "loss": at_10["loss"],
        "saved_mb": round(sum(path.stat().st_size for path in weights) / 1e6, 1),
        "launch_seconds": round(seconds, 1),
    }
    if not variant.resumes:
        return result
    (run / "metrics.json").unlink()
    for path in [*run.glob(f"checkpoint-{STEPS}"), *weights]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, seconds = launch(variant, run, args, log)
    if code:
        return result | {"failed": "continuing: " + reason(log)}
    last = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return result | {"continued_to_step": last["global_step"], "continuation_seconds": round(seconds, 1)}


def reason(log: Path) -> str:
    """The message of the command, or the last error that Python named."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    ours = [number for number, line in enumerate(lines) if line.startswith("train_llava.py:")]
    if ours:
        return " ".join(line.strip() for line in lines[ours[-1] : ours[-1] + 2])[:300]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line and "CalledProc" not in line]
    return errors[-1][-300:] if errors else f"see {log}"


def table(results: dict[str, dict[str, object]]) -> str:
    lines = ["| | samples/s | peak GiB per GPU | saved MB | continued |", "|---|---|---|---|---|"]
    for name, result in results.items():
        if "samples_per_second" not in result:
            lines.append(f"| {name} | {result['failed']} | | | |")
            continue
        continued = result.get("failed") or result.get("continued_to_step", "")
        peak = result["peak_memory_gib"] if result["peak_memory_gib"] is not None else ""
        lines.append(f"| {name} | {result['samples_per_second']} | {peak} | {result['saved_mb']} | {continued} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model whose config and processor are taken")
    parser.add_argument("--work", type=Path, required=True, help="new folder for weights, rows and runs (20 GB for 7B)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results, written after each")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--batch_size", type=int, default=8, help="rows of each process")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=540, help="no strategy is begun after so long")
    args = parser.parse_args()
    started = time.perf_counter()
    args.work.mkdir(parents=True)
    make_model(args.model, args.work / "model")
    make_dataset(args.work / "data", args.batch_size * args.processes * STEPS)
    torch.cuda.empty_cache()
    print(f"model and rows made in {time.perf_counter() - started:.0f} s", flush=True)
    results = {}
    for name in args.only:
        if time.perf_counter() - started > args.seconds:
            results[name] = {"failed": "not begun: out of time"}
            continue
        run = args.work / name.replace(", ", "_").replace(" ", "_")
        results[name] = measure(VARIANTS[name], run, args)
        shutil.rmtree(run, ignore_errors=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"{time.perf_counter() - started:.0f} s: {name}: {results[name]}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
