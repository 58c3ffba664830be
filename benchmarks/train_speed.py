"""Training speed and memory of this project beside plain TRL, on the same rows, in turns, in one run.

    python benchmarks/train_speed.py --model llava-hf/llava-1.5-7b-hf --output benchmarks/results/llava
    python benchmarks/train_speed.py --model models/tiny-llava --steps 6 --warmup 2 --output benchmarks/results/smoke

Only the config and the processor of the model are read: its weights are drawn at random in the published shape, since
speed does not depend on their values. Measured on one NVIDIA H200; the second line runs anywhere, on a CPU in a minute.
With `--unsloth PYTHON` Unsloth can run beside them, in its own environment. Writes results.json, report.md and losses.png.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, Features, Image, List, Value
from matplotlib import pyplot
from peft import LoraConfig, get_peft_model
from PIL import Image as Picture
from PIL import ImageDraw
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, set_seed
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from clock import Clock, free_memory, limit_memory

from finetuning.arguments import TrainingArguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image
from finetuning.families import family_of, is_vision
from finetuning.kernels.fp8_backward import pass_gradients_in_fp8
from finetuning.kernels.int8_base import hold_base_in_int8
from finetuning.kernels.lora_layers import fuse_lora, stack_4bit_weights
from finetuning.kernels.model_patches import (
    count_image_tokens_once,
    ignore_right_padding,
    vision_tower_without_autocast,
)
from finetuning.kernels.packed_attention import register_packed_attention
from finetuning.kernels.shared_prefix_attention import enable_shared_prefix
from finetuning.models.parts import decoder_layers
from finetuning.models.processing import load_config, load_processing_class
from finetuning.training.trainer import FineTuningTrainer


@dataclass(frozen=True)
class Variant:
    """One way to train; what is not said is as TRL's command line gives it."""

    ours: bool = False
    whole_model: bool = False  # LoRA on the vision tower and the projector too, as `all-linear` does
    dropout: float = 0.0
    checkpoint_layers: str = "0"
    nf4: bool = False
    dora: bool = False
    base: str = ""  # base_precision: fp8_backward or int8
    questions: int = 1  # dialogues about each image
    shared: bool = False
    packed: int = 0  # rows of a text are packed into sequences of so many tokens
    padding_free: bool = False  # the rows of a batch side by side in one sequence
    batch_size: int | None = None
    accumulate: int = 1
    graphs: bool = False  # passes as CUDA graphs
    optim: str = "adamw_torch_fused"  # the known recipe: paged_adamw_8bit
    offloads: bool = False  # activations to main memory, by TRL's `activation_offloading`
    unsloth: bool = False  # by Unsloth, in its own environment


SMALL = Variant(nf4=True, dropout=0.05, checkpoint_layers="all", optim="paged_adamw_8bit")  # for small cards
LLAVA = {
    "TRL as it comes": Variant(whole_model=True, dropout=0.05, checkpoint_layers="all"),
    "TRL by hand": Variant(),
    "this project": Variant(ours=True),
    "this project, dropout 0.05": Variant(ours=True, dropout=0.05),
    "TRL, DoRA": Variant(dora=True),
    "this project, DoRA": Variant(ours=True, dora=True),
    "this project, FP8 backward": Variant(ours=True, base="fp8_backward"),
    "this project, INT8": Variant(ours=True, base="int8"),
    "this project, NF4 to INT8": Variant(ours=True, nf4=True, base="int8"),
    "TRL, NF4": Variant(nf4=True, dropout=0.05, checkpoint_layers="all"),
    "this project, NF4, 14.5 GiB": Variant(ours=True, nf4=True, checkpoint_layers="17"),
    # With --memory_gib: the recipes for small cards beside the same rows at once, and beside TRL row by row.
    "this project, NF4, 8 at once": Variant(ours=True, nf4=True, dropout=0.05, checkpoint_layers="auto"),
    "this project, NF4, 4 at once": replace(SMALL, ours=True, checkpoint_layers="auto", batch_size=4, accumulate=2),
    "this project, NF4, 1 at once": replace(SMALL, ours=True, checkpoint_layers="auto", batch_size=1, accumulate=8),
    "this project, NF4, 4 at once, offloaded": replace(
        SMALL, ours=True, batch_size=4, accumulate=2, checkpoint_layers="all", offloads=True
    ),
    "TRL, NF4, 4 at once": replace(SMALL, batch_size=4, accumulate=2),
    "TRL, NF4, 1 at once": replace(SMALL, batch_size=1, accumulate=8),
    # Dropout, which its fast layers lack, is left out for Unsloth's sake.
    "Unsloth, NF4, 4 at once": replace(SMALL, unsloth=True, dropout=0.0, batch_size=4, accumulate=2),
    "Unsloth, NF4, 1 at once": replace(SMALL, unsloth=True, dropout=0.0, batch_size=1, accumulate=8),
    "Unsloth": Variant(unsloth=True),
    "Unsloth, NF4": Variant(unsloth=True, nf4=True, checkpoint_layers="all"),
    "this project, 3 questions, separate": Variant(ours=True, questions=3),
    "this project, 3 questions, shared": Variant(ours=True, questions=3, shared=True),
    "this project, 3 questions, shared, INT8": Variant(ours=True, questions=3, shared=True, base="int8"),
}
GEMMA = {
    "TRL, one row a step": Variant(checkpoint_layers="all", dropout=0.05, batch_size=1),
    "TRL, packed": Variant(checkpoint_layers="all", packed=1024),
    "TRL, packed, by hand": Variant(packed=1024),
    "this project, packed": Variant(ours=True, packed=1024),
    "this project, packed, INT8": Variant(ours=True, packed=1024, base="int8"),
    "TRL, NF4, 4 rows a step, one by one": Variant(
        nf4=True, checkpoint_layers="all", dropout=0.05, batch_size=1, accumulate=4, optim="paged_adamw_8bit"
    ),
    "this project, NF4, 4 rows a step, at once": Variant(
        ours=True, nf4=True, dropout=0.05, padding_free=True, batch_size=4, optim="paged_adamw_8bit"
    ),
    "this project, NF4, 4 rows a step, CUDA graphs": Variant(
        ours=True, nf4=True, dropout=0.05, padding_free=True, batch_size=4, graphs=True, optim="paged_adamw_8bit"
    ),
    "this project, NF4, packed": Variant(ours=True, nf4=True, packed=1024),
}
DEFAULTS = ["TRL as it comes", "TRL by hand", "this project", "TRL, packed", "this project, packed"]


def draw_rows(number: int, questions: int, *, vision: bool, side: int = 336, seed: int = 0) -> Dataset:
    """Pictures of `side` pixels with dots and how many there are; or, for a text model, facts of 30 to 220 words' length about nothing."""
    drawn = random.Random(seed)
    rows = []
    for index in range(number):
        if not vision:
            words = " ".join(
                drawn.choice(["red", "blue", "old", "new", "tall", "small"]) for _ in range(30 + index * 37 % 90)
            )
            rows.append({"messages": dialogue(f"What is known about number {index}?", f"It is {words}.")})
            continue
        dots = drawn.randint(1, 20)
        picture = Picture.new("RGB", (side, side), tuple(drawn.randint(0, 255) for _ in range(3)))
        for _ in range(dots):
            x, y = drawn.randint(10, side - 16), drawn.randint(10, side - 16)
            ImageDraw.Draw(picture).ellipse((x, y, x + 12, y + 12), fill=(250, 250, 250))
        texts = ["How many dots do you see?", "Count the dots in this picture.", "What number of dots is there?"]
        for question in texts[:questions]:
            answer = f"There are {dots} dots in the picture."
            rows.append({"messages": dialogue(question, answer), "images": [picture], "image_id": str(index)})
    message = {"role": Value("string"), "content": Value("string")}
    features = {"messages": List(message)}
    if vision:
        features |= {"images": List(Image()), "image_id": Value("string")}
    return Dataset.from_list(rows, features=Features(features))


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer as `messages`."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def random_model(name: str, variant: Variant, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The published shape with weights drawn on the device, its language model in 4 bits where the variant says so."""
    config = load_config(name)
    attention = "packed" if variant.ours and (variant.packed or variant.padding_free) else "sdpa"
    auto_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    with torch.device(device):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
    if variant.nf4:
        quantize(model, dtype)
    return model


def quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace the decoder's linear layers by NF4 ones with nested scales, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name and "vision_tower" not in name
    ]
    for name, layer in layers:
        new = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta")
        new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)  # pyrefly: ignore[unexpected-keyword]
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to(layer.weight.device))
        layer.weight = None
    model.is_loaded_in_4bit = True


def arguments_of(variant: Variant, options: argparse.Namespace, folder: Path, *, vision: bool, cuda: bool) -> dict:
    """What `SFTConfig` gets."""
    batch_size = variant.batch_size or options.batch_size
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size * (1 if variant.shared else variant.questions),
        "gradient_accumulation_steps": variant.accumulate,
        "max_steps": options.warmup + options.steps,
        "learning_rate": options.learning_rate,
        "optim": variant.optim,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": variant.checkpoint_layers != "0",
        "activation_offloading": variant.offloads,
        "assistant_only_loss": not variant.unsloth,
        "packing": bool(variant.packed),
        "padding_free": variant.padding_free,
        "max_length": variant.packed or None,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": min(options.logging_steps, options.warmup + options.steps),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": options.workers,
        "remove_unused_columns": not vision,
        "seed": options.seed,
        "train_sampling_strategy": "sequential",
        # As the recipes have it: nothing waits for the GPU where the loss is not looked at.
        "logging_nan_inf_filter": not variant.ours,
        "accelerator_config": {"non_blocking": variant.ours},
    }


def lora_of(variant: Variant, *, vision: bool) -> dict:
    """What `LoraConfig` gets."""
    language_model = r".*language_model\.layers\..*(?:q|k|v|o|gate|up|down)_proj"
    targets = "all-linear" if variant.whole_model or not vision else language_model
    sizes = {"r": 64, "lora_alpha": 32, "lora_dropout": variant.dropout}
    return sizes | {"target_modules": targets, "use_dora": variant.dora}


def train(
    name: str, variant: Variant, gib: float | None, options: argparse.Namespace, unsloth_folder: Path, bar: tqdm
) -> dict:
    """Train for `options.warmup + options.steps` steps in `gib` of the GPU; what was measured, or `failed`."""
    said = {"variant": name, **asdict(variant), "memory_gib": gib}
    try:
        return said | measure(variant, gib, options, unsloth_folder, bar)
    except (torch.OutOfMemoryError, ValueError) as error:  # does not fit: that is a result
        if gib is None:
            raise
        return said | {"failed": str(error).splitlines()[0]}


def measure(variant: Variant, gib: float | None, options: argparse.Namespace, unsloth_folder: Path, bar: tqdm) -> dict:
    """Seconds, tokens, memory and losses. Raises OutOfMemoryError, or ValueError where no choice of layers fits."""
    config = load_config(options.model)
    vision = is_vision(config)
    batch_size = variant.batch_size or options.batch_size
    steps = options.warmup + options.steps
    rows_needed = steps * batch_size * variant.accumulate * (options.rows_a_sequence if variant.packed else 1)
    rows = draw_rows(rows_needed, variant.questions, vision=vision, side=options.picture_size)
    if variant.unsloth:
        run = train_by_unsloth(variant, rows, gib, options, unsloth_folder, bar)
    else:
        run = train_here(variant, rows, gib, options, options.output / "run", bar)
    seconds, tokens = run.pop("seconds"), run.pop("tokens_a_step")
    answers = batch_size * variant.accumulate * variant.questions
    measured = {
        "ms_a_step": 1000 * seconds / options.steps,
        "samples_a_second": None if variant.packed else answers * options.steps / seconds,
        "tokens_a_step": tokens,
        "tokens_a_second": tokens * options.steps / seconds,
        **run,
    }
    if vision and not variant.shared:
        views = answers * family_of(config).views(config, (options.picture_size, options.picture_size))
        operations = needed_flops(config, tokens, answers, views)
        measured["share_of_peak"] = operations * options.steps / seconds / options.peak
    return measured


def train_here(
    variant: Variant, rows: Dataset, gib: float | None, options: argparse.Namespace, folder: Path, bar: tqdm
) -> dict:
    """By TRL or by this project, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vision = "images" in rows.column_names
    # Ours has fields of its own; precision and the rest are given, so that both train alike.
    kind = TrainingArguments if variant.ours else SFTConfig
    args = kind(**arguments_of(variant, options, folder, vision=vision, cuda=device == "cuda"))
    processing_class = load_processing_class(options.model)
    set_seed(options.seed)
    limit_memory(None)  # the model is larger before it is quantised
    model = random_model(options.model, variant, device, dtype)
    limit_memory(gib)
    set_seed(options.seed)
    lora = LoraConfig(**lora_of(variant, vision=vision))
    clock = Clock(options.warmup, bar.update)
    common = {"args": args, "processing_class": processing_class, "callbacks": [clock]}
    if not variant.ours:
        trainer = SFTTrainer(model=model, train_dataset=rows, peft_config=lora, **common)
    else:
        model = get_peft_model(model, lora)
        if variant.base == "int8":
            hold_base_in_int8(model)
        fused = fuse_lora(model)
        stack_4bit_weights(model)
        ignore_right_padding(model)
        vision_tower_without_autocast(model)
        count_image_tokens_once(model)
        if variant.shared:
            enable_shared_prefix(model)
        if variant.base:
            pass_gradients_in_fp8(model)
        if vision:
            common["data_collator"] = (SharedPrefixCollator if variant.shared else LlavaDataCollator)(processing_class)
        checkpoint_layers = variant.checkpoint_layers
        if checkpoint_layers not in ("auto", "all"):
            checkpoint_layers = str(min(int(checkpoint_layers), len(decoder_layers(model))))
        trainer = FineTuningTrainer(
            model=model,
            train_dataset=group_by_image(rows) if variant.shared else rows,
            checkpoint_layers=checkpoint_layers,
            cuda_graphs=variant.graphs,
            **common,
        )
        assert fused > 0
    trainer.train()
    measured = clock.measured(trainer)
    if variant.ours:
        measured["checkpointed_layers"] = trainer.layer_checkpointing.count if trainer.layer_checkpointing else 0
    if device == "cuda":
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    del trainer, model
    free_memory()
    return measured


def train_by_unsloth(
    variant: Variant, rows: Dataset, gib: float | None, options: argparse.Namespace, folder: Path, bar: tqdm
) -> dict:
    """By `unsloth_speed.py` in the Python `options.unsloth`, which gets the weights, the tokens and the labels in files.

    The version of transformers that Unsloth takes cannot say which tokens of a row with a picture are the assistant's.
    """
    cuda = torch.cuda.is_available()
    processor = load_processing_class(options.model)
    if not (folder / "model").exists():
        set_seed(options.seed)
        model = random_model(
            options.model, Variant(), "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32
        )
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        del model
        free_memory()
    collator = LlavaDataCollator(processor)

    def tokenise(row: dict) -> dict:
        batch = collator([row])
        return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0]}

    rows = rows.map(tokenise)
    rows.save_to_disk(folder / "rows")
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    order = {
        "arguments": arguments_of(variant, options, folder / "run", vision=True, cuda=cuda),
        "lora": lora_of(variant, vision=True),
        "nf4": variant.nf4,
        "warmup": options.warmup,
        "memory_gib": gib,
        "memory_elsewhere": total - free,
    }
    (folder / "order.json").write_text(json.dumps(order), encoding="utf-8")
    last_lines = deque(maxlen=30)
    with (
        subprocess.Popen(
            [options.unsloth, Path(__file__).with_name("unsloth_speed.py"), folder],
            env=environment_of_unsloth(),
            cwd=folder,  # what Unsloth compiles stays there
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        open(options.output / "unsloth.log", "a", buffering=1, encoding="utf-8") as log,
    ):
        for line in process.stdout:
            log.write(line)
            if line == "step\n":
                bar.update()
            else:
                last_lines.append(line)
    if process.returncode != 0:
        sys.exit(f"train_speed.py: {options.unsloth} ended with {process.returncode}:\n{''.join(last_lines)}")
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    if "failed" in measured:
        raise torch.OutOfMemoryError(measured["failed"])
    return measured | {"tokens_a_step": sum(map(len, rows["input_ids"])) / (options.warmup + options.steps)}


def needed_flops(model_config: PreTrainedConfig, tokens: float, rows: int, views: int) -> float:
    """Operations of a step with frozen weights: 4 per weight and token, causal attention, the vision tower's forward.

    `views` are how often the tower sees a picture or a tile of it.
    """
    config, vision = model_config.text_config, model_config.vision_config
    width, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention_width = config.num_attention_heads * head_dim
    weights = layers * (
        2 * width * (attention_width + config.num_key_value_heads * head_dim) + 3 * width * config.intermediate_size
    )
    attention = layers * 3.5 * 2 * (tokens / rows) ** 2 * attention_width * rows
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower = vision.num_hidden_layers * (2 * block + 4 * patches * vision.hidden_size) * patches
    return 4 * weights * tokens + attention + tower * views


def peak_rate() -> float:
    """Operations a second of a large matrix product on this device, in the type that training uses."""
    cuda = torch.cuda.is_available()
    size = 8192 if cuda else 1024
    left, right = (
        torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else None)
        for _ in range(2)
    )
    for _ in range(3):
        left @ right
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        left @ right
    if cuda:
        torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - started)


def write_report(results: list[dict], options: argparse.Namespace, folder: Path) -> str:
    """Write results.json into `folder`; returns the same as Markdown."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    facts = {"machine": machine, "torch": torch.__version__, **{k: str(v) for k, v in vars(options).items()}}
    (folder / "results.json").write_text(
        json.dumps({"facts": facts, "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    means, failures = [], []
    for name, gib in dict.fromkeys((result["variant"], result["memory_gib"]) for result in results):
        rounds = [result for result in results if (result["variant"], result["memory_gib"]) == (name, gib)]
        title = name if gib is None else f"{name}, in {gib:g} GiB"
        if failed := next((result["failed"] for result in rounds if "failed" in result), None):
            failures.append(f"{title}: {failed}")
        else:
            means.append((title, rounds, sum(r["ms_a_step"] for r in rounds) / len(rounds)))
    lines = [
        f"{machine}, torch {torch.__version__}, {options.model} in its published shape with random weights, LoRA r=64, "
        f"batch {options.batch_size}, mean of {options.steps} steps after {options.warmup} to warm up, "
        f"{options.rounds} rounds in turns; matrix peak {options.peak / 1e12:.3g} TFLOP/s",
        "",
        "| way | answers/s | tokens/s | ms/step | peak GiB | share of peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, rounds, ms in means:
        first = rounds[0]
        answers = first["samples_a_second"]
        cells = [
            f"{answers * first['ms_a_step'] / ms:.1f}" if answers else "",
            f"{first['tokens_a_step'] / ms * 1000:,.0f}",
            f"{ms:.0f}",
            f"{max(r['peak_gib'] for r in rounds):.1f}" if first["peak_gib"] else "",
            f"{first['share_of_peak'] * first['ms_a_step'] / ms:.2f}" if first.get("share_of_peak") else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join([*lines, *(f"\n{failure}" for failure in failures)]) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, rounds, _ in means:
        axes.plot(rounds[0]["loss_steps"], rounds[0]["losses"], label=name)
    axes.set(xlabel="step", ylabel="training loss", title="The same rows, the same seed")
    axes.legend()
    figure.savefig(folder / "losses.png", dpi=120)
    pyplot.close(figure)
    return text


def python_with_unsloth(python: str | None) -> str:
    """The absolute path of that program, or the end of this one."""
    if python is None:
        sys.exit("train_speed.py: Unsloth runs in an environment of its own: name its Python with --unsloth PYTHON")
    found = shutil.which(python)
    if found is None:
        sys.exit(f"train_speed.py: --unsloth {python}: no such program; give the Python of Unsloth's environment")
    finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('unsloth') is None)"
    if subprocess.run([found, "-c", finds], env=environment_of_unsloth()).returncode != 0:
        sys.exit(f"train_speed.py: --unsloth {python} has no Unsloth: {python} -m pip install unsloth")
    return os.path.abspath(found)


def environment_of_unsloth() -> dict[str, str]:
    """This process's without its packages; nothing is fetched or sent."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return ours | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


def main() -> None:
    """Train each variant in turn, round by round, and write tables and the plot of losses to --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="Hub name or folder; config and processor are read, no weights")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results; must not hold any yet")
    parser.add_argument("--variants", nargs="+", help=f"of LLaVA: {', '.join(LLAVA)}; of Gemma: {', '.join(GEMMA)}")
    parser.add_argument("--unsloth", metavar="PYTHON", help="Python of an environment in which Unsloth is installed")
    parser.add_argument("--steps", type=int, default=20, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=2, help="how often each variant runs, in turns")
    parser.add_argument("--batch_size", type=int, default=8, help="images (or text rows) a step")
    parser.add_argument("--picture_size", type=int, default=336, help="side of the drawn pictures in pixels")
    parser.add_argument("--rows_a_sequence", type=int, default=12, help="text rows drawn for a packed sequence")
    parser.add_argument(
        "--memory_gib",
        type=float,
        nargs="+",
        help="most memory of the GPU, the CUDA context included: for all, or for each",
    )
    parser.add_argument("--workers", type=int, default=4, help="loader processes")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--logging_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.output / "results.json").exists():
        sys.exit(f"train_speed.py: {options.output} holds results already: choose another --output")
    try:
        vision = is_vision(load_config(options.model))
    except ValueError as error:
        sys.exit(f"train_speed.py: {error}")
    known = LLAVA if vision else GEMMA
    names = options.variants or [name for name in DEFAULTS if name in known]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"train_speed.py: --variants {unknown} are unknown for this model; there are {list(known)}")
    limits = (options.memory_gib or [None]) * (1 if len(options.memory_gib or ()) > 1 else len(names))
    if len(limits) != len(names):
        sys.exit(
            f"train_speed.py: --memory_gib has {len(limits)} numbers for {len(names)} variants: give one, or one each"
        )
    if any(known[name].unsloth for name in names):
        options.unsloth = python_with_unsloth(options.unsloth)
    options.output.mkdir(parents=True, exist_ok=True)
    register_packed_attention()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    options.peak = peak_rate()
    results = []
    with (
        TemporaryDirectory(prefix="unsloth-") as unsloth_folder,
        tqdm(total=options.rounds * len(names) * (options.warmup + options.steps), unit="step") as bar,
    ):
        for _ in range(options.rounds):
            for name, gib in zip(names, limits, strict=True):
                bar.set_description(name)
                results.append(train(name, known[name], gib, options, Path(unsloth_folder), bar))
                report = write_report(results, options, options.output)
    print(report)


if __name__ == "__main__":
    main()
