"""One recipe under every strategy: rows a second, messages, memory of each GPU, a checkpoint, a continuation from it.

    python benchmarks/multi_gpu.py --model llava-hf/llava-1.5-7b-hf --work /tmp/multi_gpu --output multi_gpu.json
    python benchmarks/multi_gpu.py --model models/tiny-llava --work /tmp/multi_gpu --output multi_gpu.json --batch_size 2

Only the config and the processor of the model are read: its weights are drawn at random in the published shape and
written to disk, so that every strategy loads them as it would load the real ones. First each strategy trains 21 steps by
`scripts/train_llava.py`, logging every 10 as the recipes do, with a checkpoint at step 20. Its last step is profiled by
`messages.py`. Before them one GPU trains alone, on every GPU at the same time: what waits for others is as fast as the
slowest. Then, while there is time, 1,200 frames are asked about on one GPU and on all, and each strategy loses what came
after its checkpoint and is started again. The JSON is written after every launch. The second line runs on a CPU, where
strategies that need GPUs are listed with the reason for which they were refused.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed

ROOT = Path(__file__).parents[1]
STEPS, CHECKPOINT = 21, 20
FRAMES = 1200  # asked about in the evaluation
ALONE = {"LoRA": "LoRA, one GPU", "QLoRA": "QLoRA, one GPU"}
GRACE = 50  # seconds that a launch may go on after --seconds


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
    "QLoRA, one GPU": Variant("single_gpu", QLORA, processes=1, resumes=False),
    "QLoRA, DDP": Variant("ddp", QLORA),
    "LoRA, ZeRO-3": Variant("deepspeed_zero3"),
    "QLoRA, FSDP2": Variant("fsdp2", QLORA | {"bnb_4bit_quant_storage": "float32"}),
    # A checkpoint of 7 billion trained numbers takes 100 GB: only the result is saved, unless --layers makes it small.
    "full, ZeRO-3": Variant("deepspeed_zero3", FULL, resumes=False),
    "full, FSDP2": Variant("fsdp2", FULL, resumes=False),
    "LoRA, ZeRO-3, offload": Variant("deepspeed_zero3_offload"),
    "LoRA, ZeRO-2": Variant("deepspeed_zero2"),
    "LoRA, FSDP2": Variant("fsdp2"),
    "QLoRA, ZeRO-2": Variant("deepspeed_zero2", QLORA),
}


def make_model(name: str, folder: Path, layers: int | None = None) -> None:
    """Save a model of the published shape with random weights in bf16 into `folder`; `layers` makes it shallower."""
    config = AutoConfig.from_pretrained(name)
    if layers:
        config.text_config.num_hidden_layers = layers
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
    frames = train.select([index % num_rows for index in range(FRAMES)])
    DatasetDict({"train": train, "validation": train.select(range(2)), "test": frames}).save_to_disk(folder)


def launch(
    variant: Variant, run: Path, args: argparse.Namespace, seconds: float, gpu: int | None = None
) -> dict[str, object]:
    """Train, or continue, as `started` says; on one GPU alone where `gpu` is its number."""
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
        "logging_steps": 10,
        "eval_strategy": "no",
        "lora_dropout": 0.0,
        "gradient_checkpointing": False,
    } | variant.flags
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return started(["benchmarks/messages.py", "scripts/train_llava.py", *words], variant, run, args, seconds, gpu)


def started(
    words: list[str], variant: Variant, run: Path, args: argparse.Namespace, seconds: float, gpu: int | None = None
) -> dict[str, object]:
    """Launch a script: `{"seconds": it took}`, and `failed` and the log's `last_lines` where it did not end well."""
    processes = variant.processes or args.processes
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{variant.config}.yaml")]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *words]
    # A single process that sees several GPUs is refused: it would copy the model to all of them at every step.
    alone = {"CUDA_VISIBLE_DEVICES": str(gpu or 0)} if processes == 1 and torch.cuda.is_available() else {}
    log = run.with_suffix(".log")
    begun = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | alone, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = launcher.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # The launcher ends its trainers, which have sessions of their own, within 30 seconds.
            os.killpg(launcher.pid, signal.SIGTERM)
            code = launcher.wait()
            file.write(f"\nstopped after {seconds:.0f} s\n")
    outcome: dict[str, object] = {"seconds": round(time.perf_counter() - begun, 1)}
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # What the launcher says of processes that it ended hides why it had to.
        ended = [number for number, line in enumerate(lines) if "torch/distributed/elastic" in line]
        lines = lines[: ended[0]] + lines[-1:] if ended else lines
        outcome |= {"failed": reason(lines), "last_lines": [line[-300:] for line in lines[-40:]]}
    return outcome


def reason(lines: list[str]) -> str:
    """What the benchmark or the command said, or the first error that Python named."""
    if lines[-1].startswith("stopped after"):
        return lines[-1]
    ours = [number for number, line in enumerate(lines) if re.match(r"(train|evaluate)_llava\.py:", line)]
    if ours:
        return " ".join(line.strip() for line in lines[ours[-1] : ours[-1] + 3])[:400]
    errors = [line for line in lines if re.search(r"(Error|Exception)\b.*:", line) and "ChildFailedError" not in line]
    return errors[0][-400:] if errors else lines[-1][-400:]


def train(
    variant: Variant, run: Path, args: argparse.Namespace, seconds: float, gpu: int | None = None
) -> dict[str, object]:
    """Speed over steps 11 to 20, the largest peak of any GPU, what was saved, its messages; or why it did not."""
    outcome = launch(variant, run, args, seconds, gpu)
    if "failed" in outcome:
        return outcome
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    at_20 = next(entry for entry in history if entry.get("step") == CHECKPOINT and "loss" in entry)
    return outcome | {
        "samples_per_second": at_20["samples_per_second"],
        "peak_memory_gib": at_20.get("peak_memory_gib"),
        "loss": at_20["loss"],
        "saved_mb": round(sum(path.stat().st_size for path in run.glob("*.safetensors")) / 1e6, 1),
        "messages": json.loads((run / "messages.json").read_text(encoding="utf-8")),
    }


def train_alone(variant: Variant, run: Path, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """One GPU's training on every GPU at the same time: the first one's result, with the slowest one's speed."""
    gpus = range(args.processes) if torch.cuda.is_available() else range(1)
    runs = [run.with_name(f"{run.name}_{gpu}") for gpu in gpus]
    with ThreadPoolExecutor(len(runs)) as pool:
        results = list(pool.map(lambda gpu, own: train(variant, own, args, seconds, gpu), gpus, runs))
    for own in runs:
        shutil.rmtree(own, ignore_errors=True)
    failed = next((result for result in results if "failed" in result), None)
    speeds = [result.get("samples_per_second") for result in results]
    return failed or results[0] | {"samples_per_second_of_each": speeds, "slowest": min(speeds)}


def evaluate(run: Path, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Seconds that `FRAMES` questions to base and tuned model take on one GPU and on all, their start left out."""
    found: dict[str, object] = {}
    for processes in (1, args.processes):
        for limit in (processes, FRAMES):
            words = ["scripts/evaluate_llava.py", "--run", str(run), "--limit", str(limit), "--overwrite"]
            outcome = started(words, Variant("ddp", processes=processes), run.with_name("evaluation"), args, seconds)
            if "failed" in outcome:
                return outcome
            found[f"{processes} processes, {limit} questions"] = outcome["seconds"]
    lengths = list(found.values())
    return found | {"times_one_gpu": round((lengths[1] - lengths[0]) / (lengths[3] - lengths[2]), 2)}


def proceed(variant: Variant, run: Path, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Forget what came after the checkpoint, and start the same command again."""
    (run / "metrics.json").unlink()
    for path in [*run.glob(f"checkpoint-{STEPS}"), *run.glob("*.safetensors")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    outcome = launch(variant, run, args, seconds)
    if "failed" not in outcome:
        outcome["to_step"] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["global_step"]
    return outcome


def table(results: dict[str, dict[str, object]]) -> str:
    """The results as a Markdown table, one row for each strategy."""
    heads = ["", "samples/s", "times one GPU", "times the slowest alone", "peak GiB per GPU", "MB sent a step"]
    heads += ["waits for messages", "loss", "saved MB", "continued"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, result in results.items():
        alone = results.get(ALONE.get(name.split(",")[0], ""), {})
        if "failed" in result:
            lines.append(f"| {name} | {result['failed']}{' |' * len(heads[1:])}")
            continue
        speed, messages = result["samples_per_second"], result["messages"]
        waits = messages["waiting_ms"] is not None and f"{messages['waiting_ms'] / messages['step_ms']:.1%}"
        cells = [name, speed]
        cells += [alone.get(key) and f"{speed / alone[key]:.2f}" for key in ("samples_per_second", "slowest")]
        cells += [
            result["peak_memory_gib"],
            (sent := messages["bytes_sent"]) and round(sent / 1e6, 1),
            waits,
            result["loss"],
        ]
        cells += [
            result["saved_mb"],
            (continued := result.get("continued", {})).get("failed") or continued.get("to_step"),
        ]
        lines.append(f"| {' | '.join('' if cell in (None, False) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train under each strategy in turn, and write what each step took and held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model whose config and processor are taken")
    parser.add_argument("--work", type=Path, required=True, help="new folder for weights, rows and runs (35 GB for 7B)")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file of the results, written after each launch"
    )
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--batch_size", type=int, default=8, help="rows of each process")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--layers", type=int, help="decoder layers, fewer than published: full runs are then continued too"
    )
    parser.add_argument(
        "--seconds", type=float, default=3600, help=f"nothing is begun after so long, or goes on {GRACE} s later"
    )
    args = parser.parse_args()
    started = time.perf_counter()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True)
    make_model(args.model, args.work / "model", args.layers)
    make_dataset(args.work / "data", args.batch_size * args.processes * STEPS)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"model and rows made in {time.perf_counter() - started:.0f} s", flush=True)
    variants = VARIANTS | ({"full, ZeRO-3": replace(VARIANTS["full, ZeRO-3"], resumes=True)} if args.layers else {})
    results: dict[str, dict[str, object]] = {}
    runs = {name: args.work / name.replace(", ", "_").replace(" ", "_") for name in args.only}

    def left() -> float:
        return args.seconds - (time.perf_counter() - started)

    def keep(name: str, result: dict[str, object]) -> None:
        results[name] = result
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        shown = {key: value for key, value in result.items() if key != "last_lines"}
        print(f"{time.perf_counter() - started:.0f} s: {name}: {shown}", flush=True)

    for name, run in runs.items():
        variant, how = variants[name], train_alone if name in ALONE.values() else train
        keep(name, how(variant, run, args, left() + GRACE) if left() > 0 else {"failed": "not begun: out of time"})
        if not variant.resumes:
            shutil.rmtree(run, ignore_errors=True)
    whole = next((name for name in runs if variants[name].resumes and "failed" not in results[name]), None)
    if whole and left() > 0:
        keep(whole, results[whole] | {"evaluation": evaluate(runs[whole], args, left() + GRACE)})
    # What was trained on several GPUs in few bytes can wait: the figures of all come first.
    for name, run in runs.items():
        if variants[name].resumes and "failed" not in results[name] and left() > 0:
            keep(name, results[name] | {"continued": proceed(variants[name], run, args, left() + GRACE)})
    print(table(results))


if __name__ == "__main__":
    main()
