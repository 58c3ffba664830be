"""Will it fit, and how long will it take? Memory, time and cost of a recipe, before anything is loaded or paid.

    python scripts/plan.py --config scripts/configs/llava_qlora.yaml
    python scripts/plan.py --config scripts/configs/llava_lora.yaml --gpu a100-80 h100 --gpus 4 --price a100-80=1.8 h100=2.5
    python scripts/plan.py --config scripts/configs/llava_lora.yaml --lora_r 128 --json

Reads the recipe, the model's config and tokenizer and the prepared dataset, no weights. Other flags override the recipe, as
in training. Without --gpu it plans for this machine's GPU, or for every kind it knows (scripts/gpus.yaml). Exit status: 0
where something fits, 1 where nothing does or the recipe is wrong.
"""

import argparse
import json
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

from finetuning import command
from finetuning.command_line import read_command
from finetuning.flags import LANGUAGES, Parser, positive
from finetuning.preflight.planned_step import OFF
from finetuning.preflight.planner import Plan, Workload, all_plans, read_workload
from finetuning.preflight.step_memory import GIB
from finetuning.preflight.step_time import Gpu, gpu_named, known_gpus
from finetuning.strategy import STRATEGIES, Strategy

PARTS_IN_KOREAN = {
    "weights": "가중치", "gathered layers": "모아 온 층", "adapters": "어댑터", "optimizer": "옵티마이저", "gradients": "그래디언트",
    "workspace": "cuBLAS 작업 공간", "batch": "배치", "activations": "활성값", "loss": "손실", "vision tower": "비전 타워",
    "working memory": "계산 중 메모리", "16-bit copies": "16비트 사본", "allocator": "할당기 조각", "context": "CUDA 컨텍스트",
    "products": "행렬 곱", "attention": "어텐션", "element-wise": "원소별 연산", "4-bit weights": "4비트 풀기",
    "communication": "통신", "waiting for the host": "호스트를 기다림",
}  # fmt: skip
RECIPE = Path(__file__).parent / "configs" / "llava_qlora.yaml"
# A plan is for a GPU: cpu.yaml uses none.
STRATEGY_FILES = sorted(path.stem for path in STRATEGIES.glob("*.yaml") if path.stem != "cpu")
ONE_PROCESS = [name for name in STRATEGY_FILES if Strategy.from_file(name).kind == "one process"]
WORDS = {
    "en": {
        "rows": "{rows:,} rows, {mean:.0f} tokens on average, {longest:,} at most",
        "images": "{sequences:,} images with {rows:,} questions, {mean:.0f} tokens an image on average, {longest:,} at most",
        "here": "On {gpu}, {strategy}, {processes} process(es):",
        "memory": "  peak of each process {peak:.1f} of {memory:.1f} GiB: {verdict}",
        "fits": "fits",
        "not": "does not fit",
        "layers": "  {checkpointed} of {layers} decoder layers recomputed (checkpoint_layers: {setting})",
        "time": "  {steps:,} steps of {seconds:.2f} s, {evaluations} evaluations of {evaluation:.0f} s: {hours}; {tokens:,.0f} tokens",
        "host": "  {seconds:.2f} s a step on a host that launches kernels twice as fast: it waits for the host",
        "epoch": "  an epoch: {hours}",
        "cost": "  {cost:,.2f} at {price:.2f} for a GPU and hour",
        "table": "GPU|launch|base|recomputed|peak GiB|fits|s/step|hours|GPU hours|cost",
        "yes": "yes",
        "no": "no",
        "cheapest": "Cheapest that fits ({what}):",
        "fastest": "Fastest that fits ({what}):",
        "nothing": "Nothing of this fits. Take a smaller per_device_train_batch_size, load_in_4bit: true, more or larger GPUs.",
        "cannot": "{gpu}, {strategy}: {why}",
        "about": "Loading the weights is not in the hours. Measured on H200s: docs/training.md says how far off plans were.",
    },
    "ko": {
        "rows": "행 {rows:,}개, 평균 {mean:.0f}토큰, 최대 {longest:,}토큰",
        "images": "이미지 {sequences:,}장과 질문 {rows:,}개, 이미지마다 평균 {mean:.0f}토큰, 최대 {longest:,}토큰",
        "here": "{gpu}, {strategy}, 프로세스 {processes}개:",
        "memory": "  프로세스마다 최대 {peak:.1f} / {memory:.1f} GiB: {verdict}",
        "fits": "들어갑니다",
        "not": "들어가지 않습니다",
        "layers": "  디코더 층 {layers}개 중 {checkpointed}개를 다시 계산 (checkpoint_layers: {setting})",
        "time": "  {steps:,}스텝, 스텝마다 {seconds:.2f}초, {evaluation:.0f}초짜리 평가 {evaluations}번: {hours}; {tokens:,.0f}토큰",
        "host": "  커널을 두 배 빨리 시작하는 호스트에서는 스텝마다 {seconds:.2f}초: 호스트를 기다리는 스텝입니다",
        "epoch": "  한 에포크: {hours}",
        "cost": "  GPU 한 시간에 {price:.2f}이면 {cost:,.2f}",
        "table": "GPU|실행|원본 모델|다시 계산|최대 GiB|들어감|초/스텝|시간|GPU 시간|비용",
        "yes": "예",
        "no": "아니요",
        "cheapest": "들어가는 것 중 가장 쌈 ({what}):",
        "fastest": "들어가는 것 중 가장 빠름 ({what}):",
        "nothing": "들어가는 것이 없습니다. per_device_train_batch_size를 줄이거나, load_in_4bit: true, 더 많거나 큰 GPU를 쓰세요.",
        "cannot": "{gpu}, {strategy}: {why}",
        "about": "가중치를 읽는 시간은 빠져 있습니다. H200에서 잰 값입니다. 계획이 얼마나 틀렸는지는 docs/training.ko.md에 있습니다.",
    },
}


def duration(seconds: float) -> str:
    """4000 -> 1 h 07 min"""
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


def parse_prices(words: list[str], gpus: dict[str, Gpu]) -> dict[str, float]:
    """`2.50` or `h100=2.50 t4=0.35` -> price of a GPU and hour by kind. Raises ValueError for anything else."""
    prices: dict[str, float] = {}
    for word in words:
        name, has_name, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--price {word}: expected 2.50, or h100=2.50") from None
        if not 0 <= value < float("inf"):
            raise ValueError(f"--price {word}: expected a price of 0 or more")
        if has_name and name not in gpus:
            raise ValueError(f"--price {word}: no such GPU; there are {', '.join(gpus)}")
        prices |= {name: value} if has_name else dict.fromkeys(gpus, value)
    return prices


def gpu_of_this_machine() -> Gpu | None:
    """The kind that nvidia-smi shows first, with the memory that it says; None where there is none, or an unknown one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, memory = shown[0].rpartition(", ") if shown else ("", "", "0")
    return gpu_named(name, float(memory) * 2**20) if name else None


def command_for(plan: Plan, settings: dict[str, Any], recipe: Path, flags: list[str]) -> str:
    """The launch to paste."""
    script = "scripts/train_llava.py" if plan.training.shape.vision is not None else "scripts/train_gemma.py"
    words = ["accelerate", "launch", "--config_file", f"accelerate_configs/{plan.strategy}.yaml"]
    words += ["--num_processes", str(plan.processes)] if plan.processes > 1 else []
    words += [script, "--config", str(recipe), *flags]
    if plan.training.bits == 4:
        words += [] if settings["load_in_4bit"] else ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4"]
        words += ["--bnb_4bit_quant_storage", "float32"] if plan.strategy == "fsdp2" else []
    return shlex.join(words)


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes; Hangul takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def table(rows: list[list[str]]) -> str:
    """Columns of one width; the first row is the head."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def name_of(part: str, words: dict[str, str]) -> str:
    """A part in the language of `words`, in 22 columns."""
    name = PARTS_IN_KOREAN[part] if words is WORDS["ko"] else part
    return name + " " * (22 - columns_of(name))


def describe_plan(plan: Plan, settings: dict[str, Any], price: float | None, words: dict[str, str]) -> list[str]:
    """One plan in full."""
    verdict = words["fits" if plan.fits else "not"]
    text = plan.training.shape.text
    lines = [
        words["here"].format(gpu=plan.gpu.title, strategy=plan.strategy, processes=plan.processes),
        words["memory"].format(peak=plan.peak / GIB, memory=plan.gpu.memory / GIB, verdict=verdict),
    ]
    lines += [
        f"    {name_of(part, words)}{size / GIB:7.2f}" for part, size in plan.memory.items() if size >= 0.005 * GIB
    ]
    lines.append(
        words["layers"].format(
            checkpointed=plan.training.checkpointed, layers=text.layers, setting=settings["checkpoint_layers"]
        )
    )
    lines.append(
        words["time"].format(
            steps=plan.steps, seconds=plan.step_seconds, evaluations=plan.evaluations,
            evaluation=plan.evaluation_seconds, hours=duration(plan.seconds), tokens=plan.tokens,
        )
    )  # fmt: skip
    lines += [
        f"    {name_of(part, words)}{seconds * 1000:7.0f} ms"
        for part, seconds in plan.step.items()
        if seconds >= 0.0005
    ]
    if plan.fast_host < (1 - OFF / 2) * plan.step_seconds:
        lines.append(words["host"].format(seconds=plan.fast_host))
    lines.append(words["epoch"].format(hours=duration(plan.steps * plan.step_seconds / max(plan.epochs, 1e-9))))
    if price is not None:
        lines.append(words["cost"].format(cost=plan.gpu_hours * price, price=price))
    return lines


def as_row(plan: Plan, prices: dict[str, float], words: dict[str, str]) -> list[str]:
    """One line of the table."""
    base = f"{plan.training.bits or 8 * plan.training.weight_bytes} bit"
    base = {"int8": "INT8", "fp8_backward": "16 bit, FP8"}.get(plan.training.base_precision or "", base)
    price = prices.get(plan.gpu.name)
    return [
        plan.gpu.title + (f" x {plan.processes}" if plan.processes > 1 else ""),
        plan.strategy,
        base,
        f"{plan.training.checkpointed}/{plan.training.shape.text.layers}",
        f"{plan.peak / GIB:.1f}/{plan.gpu.memory / GIB:.0f}",
        words["yes" if plan.fits else "no"],
        f"{plan.step_seconds:.2f}",
        f"{plan.seconds / 3600:.2f}",
        f"{plan.gpu_hours:.2f}",
        f"{plan.gpu_hours * price:.2f}" if price is not None else "",
    ]


def as_json(plan: Plan, prices: dict[str, float], command: str) -> dict[str, Any]:
    """One plan for programs: bytes, seconds."""
    price = prices.get(plan.gpu.name)
    return {
        "gpu": plan.gpu.name,
        "processes": plan.processes,
        "strategy": plan.strategy,
        "bits": plan.training.bits,
        "checkpointed_layers": plan.training.checkpointed,
        "fits": plan.fits,
        "peak_bytes": round(plan.peak),
        "memory_bytes": {part: round(size) for part, size in plan.memory.items()},
        "seconds_per_step": round(plan.step_seconds, 5),
        "seconds_per_step_fast_host": round(plan.fast_host, 5),
        "step_seconds": {part: round(seconds, 6) for part, seconds in plan.step.items()},
        "steps": plan.steps,
        "evaluations": plan.evaluations,
        "evaluation_seconds": round(plan.evaluation_seconds, 2),
        "seconds": round(plan.seconds, 1),
        "gpu_hours": round(plan.gpu_hours, 4),
        "tokens": round(plan.tokens),
        "cost": None if price is None else round(plan.gpu_hours * price, 4),
        "command": command,
    }


def print_plans(
    workload: Workload, found: list[Plan | tuple[Gpu, str, str]], prices: dict[str, float], recipe: Path,
    flags: list[str], words: dict[str, str],
) -> None:  # fmt: skip
    """The recipe's own launch in full where one GPU is asked about, the table, the cheapest and the fastest."""
    train = workload.train
    plans = [plan for plan in found if isinstance(plan, Plan)]
    key = "images" if workload.shares_prefix else "rows"
    print(
        words[key].format(
            rows=train.rows, sequences=train.total, mean=train.mean("tokens"), longest=train.longest[0].tokens
        )
    )
    if plans and len({plan.gpu.name for plan in plans}) == 1:
        print(*describe_plan(plans[0], workload.settings, prices.get(plans[0].gpu.name), words), sep="\n")
    print()
    if plans:
        print(table([words["table"].split("|"), *(as_row(plan, prices, words) for plan in plans)]))
    for cannot in found:
        if not isinstance(cannot, Plan):
            print(words["cannot"].format(gpu=cannot[0].title, strategy=cannot[1], why=cannot[2]))
    fitting = [plan for plan in plans if plan.fits]
    print()
    if not fitting:
        print(words["nothing"])
        return
    fastest = min(fitting, key=lambda plan: plan.seconds)
    priced = [plan for plan in fitting if plan.gpu.name in prices]
    if priced:
        cheapest = min(priced, key=lambda plan: plan.gpu_hours * prices[plan.gpu.name])
        what = f"{cheapest.gpu.title}, {cheapest.gpu_hours * prices[cheapest.gpu.name]:.2f}"
        print(
            words["cheapest"].format(what=what),
            "  " + command_for(cheapest, workload.settings, recipe, flags),
            sep="\n",
        )
    what = f"{fastest.gpu.title}, {duration(fastest.seconds)}"
    print(words["fastest"].format(what=what), "  " + command_for(fastest, workload.settings, recipe, flags), sep="\n")
    print(words["about"])


def wrong_words(args: argparse.Namespace, prices: dict[str, float]) -> list[str]:
    """What flags ask for that would be ignored, or cannot be launched."""
    problems = []
    if args.strategy in ONE_PROCESS and args.gpus > 1:
        problems.append(
            f"--strategy {args.strategy} is one process: --gpus {args.gpus} needs ddp, fsdp2 or a DeepSpeed file"
        )
    named = [name for word in args.price if "=" in word and (name := word.rpartition("=")[0]) in prices]
    if args.gpu and "all" not in args.gpu and (idle := [name for name in named if name not in args.gpu]):
        problems.append(f"--price {' '.join(idle)}: not among --gpu {' '.join(args.gpu)}")
    return problems


def main() -> None:
    """Plan the recipe on each GPU that is asked for; exit status 1 where it fits none. Raises ValueError for wrong words."""
    gpus = known_gpus()
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="recipe, as in training")
    parser.add_argument("--gpu", nargs="+", choices=[*gpus, "all"], help="kinds of GPU to plan for")
    parser.add_argument("--gpus", type=positive, default=1, help="how many of them (default %(default)s)")
    parser.add_argument("--strategy", choices=STRATEGY_FILES, help="only this file of accelerate_configs/")
    parser.add_argument("--price", nargs="+", default=[], help="of a GPU and hour: 2.50, or h100=2.50 t4=0.35")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of what is printed (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print every plan as JSON, in bytes and seconds")
    args, flags = parser.parse_known_args()
    prices = parse_prices(args.price, gpus)
    if problems := wrong_words(args, prices):
        raise ValueError("\n".join(problems))
    _, settings = read_command(RECIPE, ["--config", str(args.config), *flags])
    workload = read_workload(vars(settings))
    here = gpu_of_this_machine() if args.gpu is None else None
    chosen = (
        [here] if here else list(gpus.values()) if args.gpu in (None, ["all"]) else [gpus[name] for name in args.gpu]
    )
    found = list(all_plans(workload, chosen, args.gpus, args.strategy))
    if args.json:
        print(json.dumps([
            as_json(plan, prices, command_for(plan, workload.settings, args.config, flags)) if isinstance(plan, Plan)
            else {"gpu": plan[0].name, "strategy": plan[1], "problem": plan[2]}
            for plan in found
        ], indent=1))  # fmt: skip
    else:
        print_plans(workload, found, prices, args.config, flags, WORDS[args.language])
    if not any(isinstance(plan, Plan) and plan.fits for plan in found):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
