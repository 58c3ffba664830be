"""Peak memory and step time of many settings of one model, each by the project's own training path: what `plan.py` is held to.

    python benchmarks/memory_grid.py --model llava-hf/llava-1.5-7b-hf --output grid.jsonl
    python benchmarks/memory_grid.py --model models/tiny-llava --output grid.jsonl --every 12

Only the config and the processor of the model are read. Its weights are drawn at random in the published shape, once, and
copied for every setting. Settings are drawn with a fixed seed: even ones are for calibration, odd ones are held out, said
before anything is measured. Another --seed draws others. The first line of the output is the machine, each further one a setting, its batch and what was
measured. All memory is that of the setting alone: the kept copy of the weights is taken off. The second line runs on a CPU.
"""

import argparse
import copy
import gc
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from bitsandbytes.optim import GlobalOptimManager
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from torch import nn
from tqdm import tqdm
from train_speed import Variant, dialogue, free_memory, peak_rate, random_model
from transformers import PrinterCallback, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image
from finetuning.families import is_vision
from finetuning.kernels.packed_attention import register_packed_attention
from finetuning.models.loading import keep_residual_stream_in_fp32
from finetuning.models.parts import decoder_layers
from finetuning.models.processing import load_config, load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.training.planned_run import launch_seconds
from finetuning.training.prepare_model import prepare_model
from finetuning.training.trainer import FineTuningTrainer

WARMUP = 2  # steps before the measured ones: kernels are compiled, the optimizer's state is made
QUESTION, ANSWER = "How many people are in view?", "There are 12 people in view."


@dataclass(frozen=True)
class Setting:
    """One training. `checkpointed` is the share of the decoder layers that are recomputed."""

    half: str  # calibration or held out
    method: str  # lora, nf4 or full
    precision: str = "bf16"
    rank: int = 64
    batch_size: int = 8  # images, text rows or packed sequences
    checkpointed: float = 0.0
    questions: int = 1  # about each image
    shared: bool = False  # the questions about an image as one sequence
    rows: str = "padded"  # of a text model: padded, side by side, packed to 1,024 tokens
    words: int = 0  # of each question beside the short one
    answer_words: int = 0
    dropout: float = 0.0
    optim: str = "adamw_torch_fused"
    projector: str = "frozen"


def llava_settings(seed: int = 24, count: int = 36, full: int = 4) -> Iterator[Setting]:
    """LoRA and NF4 of LLaVA; then full, whose weights, gradients and optimizer take 106 GiB."""
    drawn = random.Random(seed)
    halves = ["calibration", "held out"]
    for index in range(count):
        questions = drawn.choice([1, 1, 1, 3, 3])
        shared = questions == 3 and drawn.random() < 0.6
        yield Setting(
            half=halves[index % 2],
            method=["lora", "lora", "nf4", "nf4"][index % 4],
            precision=drawn.choice(["bf16", "bf16", "fp16"]),
            rank=drawn.choice([8, 16, 32, 64, 128]),
            batch_size=drawn.choice([1, 2, 4, 8, 8, 16] if questions == 1 or shared else [1, 2, 4, 8]),
            checkpointed=drawn.choice([0.0, 0.5, 1.0]),
            questions=questions,
            shared=shared,
            words=drawn.choice([0, 0, 40, 200]),
            answer_words=drawn.choice([0, 0, 60]),
            dropout=drawn.choice([0.0, 0.05]),
            optim=drawn.choice(["adamw_torch_fused", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]),
            projector=drawn.choice(["frozen"] * 4 + ["lora", "full"]),
        )
    for index in range(full):
        yield Setting(
            half=halves[index % 2],
            method="full",
            batch_size=[1, 2, 4, 4][index],
            checkpointed=[1.0, 1.0, 1.0, 0.5][index],
            projector="full",
        )


def text_settings(seed: int = 24, count: int = 18, full: int = 4) -> Iterator[Setting]:
    """LoRA, NF4 and full of a text model."""
    drawn = random.Random(seed)
    halves = ["calibration", "held out"]
    for index in range(count + full):
        rows = ["padded", "packed", "side by side"][index // 2 % 3]
        yield Setting(
            half=halves[index % 2],
            method=["lora", "lora", "nf4", "nf4"][index % 4] if index < count else "full",
            precision=drawn.choice(["bf16", "bf16", "fp16"]) if rows == "padded" and index < count else "bf16",
            rank=drawn.choice([8, 16, 32, 64, 128]),
            batch_size=drawn.choice([1, 2, 4, 8] if rows == "packed" else [1, 4, 8, 16]),
            checkpointed=drawn.choice([0.0, 0.5, 1.0]),
            rows=rows,
            words=drawn.choice([0, 40, 200]),
            answer_words=drawn.choice([30, 60, 200]),
            dropout=drawn.choice([0.0, 0.05]),
            optim=drawn.choice(["adamw_torch_fused", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]),
        )


class Weights:
    """The model's weights of one kind at a time, drawn once; `fresh` gives a copy to train, or themselves where all is trained."""

    def __init__(self, model: str, device: str):
        self.name, self.device = model, device
        self.kind: tuple | None = None
        self.kept: nn.Module | None = None

    def fresh(self, setting: Setting) -> nn.Module:
        """A model as `load_base_for_training` would load it, with `attn_implementation` for the setting's rows."""
        dtype = getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[setting.precision])
        if self.device == "cpu" or setting.method == "full":
            dtype = torch.float32
        kind = (setting.method == "nf4", dtype)
        if self.kind != kind or self.kept is None:
            self.kept, self.kind = None, kind
            free_memory()
            set_seed(0)
            self.kept = random_model(self.name, Variant(nf4=setting.method == "nf4"), self.device, dtype)
        model = self.kept if setting.method == "full" else copy.deepcopy(self.kept)
        if setting.method == "full":
            self.kept = None
        if dtype == torch.float16 and model.config.model_type.startswith("gemma"):
            keep_residual_stream_in_fp32(model)
        model.set_attn_implementation("packed" if setting.rows != "padded" else "sdpa")
        return model


class StepClock(TrainerCallback):
    """A CUDA event behind each step, which nobody waits for; memory from the second step on, when Adam's state is there."""

    def __init__(self):
        self.marks: list[Any] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Mark the end of the step, on the GPU where there is one."""
        if not torch.cuda.is_available():
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()
        if state.global_step == 1:
            torch.cuda.synchronize()
            self.first_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self) -> list[float]:
        """Of each step after the warm-up."""
        pairs = list(zip(self.marks[WARMUP - 1 :], self.marks[WARMUP:], strict=False))
        if not torch.cuda.is_available():
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


class OneBatch:
    """A collator that gives one batch again and again, pinned: no step waits for rows, and all steps are alike."""

    def __init__(self, batch: dict[str, Any]):
        pin = torch.cuda.is_available()
        self.batch = {
            name: value.pin_memory() if pin and torch.is_tensor(value) else value for name, value in batch.items()
        }

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        return dict(self.batch)

    def shape(self) -> dict[str, int]:
        """Rows, their padded length, length of the longest dialogue and of an image prefix, supervised tokens, pictures."""
        batch = self.batch
        rows, length = batch["input_ids"].shape
        return {
            "rows": rows,
            "length": length,
            "longest": int(batch.get("max_length_q", length)),
            "prefix": batch.get("prefix_length", 0),
            "supervised": len(batch["supervised_rows"]),
            "pictures": len(batch.get("pixel_values", ())),
        }


def rows_of(setting: Setting, number: int, *, vision: bool) -> Dataset:
    """Rows that are all alike in size."""
    question = " ".join([QUESTION, *["people"] * setting.words])
    answer = " ".join([ANSWER, *["people"] * setting.answer_words])
    features: dict[str, Any] = {"messages": List({"role": Value("string"), "content": Value("string")})}
    if not vision:
        return Dataset.from_list([{"messages": dialogue(question, answer)}] * number, features=Features(features))
    features |= {"images": List(Image()), "image_id": Value("string")}
    picture = Picture.new("RGB", (336, 336), (90, 90, 90))
    rows = [
        {"messages": dialogue(question, answer), "images": [picture], "image_id": str(index)}
        for index in range(number)
        for _ in range(setting.questions)
    ]
    return Dataset.from_list(rows, features=Features(features))


def trainer_of(
    setting: Setting, weights: Weights, processing_class: Any, steps: int, folder: Path
) -> FineTuningTrainer:
    """What `train_llava.py` and `train_gemma.py` make of a recipe, with weights that are not read."""
    vision = is_vision(load_config(weights.name))
    cuda = weights.device == "cuda"
    rows_a_batch = setting.batch_size * (1 if setting.shared else setting.questions)
    script_args = ScriptArguments(
        dataset_name="none",
        language_model="full" if setting.method == "full" else "lora",
        projector=setting.projector,
        share_image_prefix=setting.shared,
    )
    # Adapters in fp32 beside a quantised base, and the rest, are decided by the project's own arguments.
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows_a_batch, max_steps=steps, optim=setting.optim,
        learning_rate=1e-5, lr_scheduler_type="constant", gradient_checkpointing=True, fp16=setting.precision == "fp16" and cuda,
        bf16=setting.precision == "bf16" and cuda, use_cpu=not cuda, packing=setting.rows == "packed",
        padding_free=setting.rows == "side by side", max_length=1024 if setting.rows == "packed" else None,
        logging_steps=steps, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=not vision,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    model_args = ModelArguments(
        model_name_or_path=weights.name, lora_r=setting.rank, lora_alpha=32, lora_dropout=setting.dropout
    )
    model = weights.fresh(setting)
    set_seed(0)
    with torch.device(weights.device):  # adapters are drawn where they will be
        model = set_trainable(model, script_args, model_args)
    prepare_model(model, script_args, args, shares_prefix=setting.shared)
    needed = rows_a_batch * (1 if setting.rows != "packed" else 24)
    rows = rows_of(setting, needed, vision=vision)
    num_layers = len(decoder_layers(model))
    collator = {"data_collator": (SharedPrefixCollator if setting.shared else LlavaDataCollator)(processing_class)}
    trainer = FineTuningTrainer(
        model=model,
        args=args,
        train_dataset=group_by_image(rows) if setting.shared else rows,
        processing_class=processing_class,
        checkpoint_layers=str(round(setting.checkpointed * num_layers)),
        **(collator if vision else {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(setting: Setting, weights: Weights, processing_class: Any, steps: int, folder: Path) -> dict[str, Any]:
    """Train `steps` steps; the batch's sizes, bytes and seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than the setting before
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    # With an 8-bit optimizer the Trainer registers every embedding there, for good.
    GlobalOptimManager.get_instance().module_weight_config_triple.clear()
    cuda = weights.device == "cuda"
    trainer = trainer_of(setting, weights, processing_class, steps, folder)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(weights.kept))
    rows_a_batch = trainer.args.per_device_train_batch_size
    batch = OneBatch(trainer.data_collator([trainer.train_dataset[row] for row in range(rows_a_batch)]))
    clock = StepClock()
    trainer.data_collator, trainer.args.remove_unused_columns = batch, False
    trainer.train_dataset = Dataset.from_dict({"input_ids": [0] * rows_a_batch * steps})  # whose rows nobody looks at
    trainer.add_callback(clock)
    if cuda:
        free_memory()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    seconds = clock.seconds()
    measured = {
        **asdict(setting),
        "model": weights.name,
        "batch": batch.shape(),
        "trained_parameters": sum(weight.numel() for weight in trained),
        "checkpointed_layers": trainer.layer_checkpointing.count,
        "loss": trainer.state.log_history[0].get("loss"),
        "step_seconds": [round(second, 5) for second in seconds],
        "median_seconds": statistics.median(seconds),
    }
    if cuda:
        free, total = torch.cuda.mem_get_info()
        measured |= {
            "kept_bytes": kept,
            "before_bytes": before - kept,
            "first_step_peak_bytes": clock.first_peak - kept,
            "peak_bytes": torch.cuda.max_memory_allocated() - kept,
            "after_bytes": torch.cuda.memory_allocated() - kept,
            "reserved_bytes": torch.cuda.max_memory_reserved() - kept,
            "context_bytes": total - free - torch.cuda.memory_reserved(),
        }
    return measured


def tensors_of(model: nn.Module | None) -> list[torch.Tensor]:
    """Parameters and buffers of a model on the GPU, 4-bit scales among them."""
    if model is None:
        return []
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for parameter in list(tensors.values()):
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, state.offset]
            parts += [state.state2.absmax, state.state2.code] if state.nested else []
            tensors |= {id(part): part for part in parts if part is not None}
    return [tensor for tensor in tensors.values() if tensor.is_cuda]


def machine() -> dict[str, Any]:
    """What rates are compared with: the host's launches, the chip, its matrix peak in bf16, its copies of memory."""
    if not torch.cuda.is_available():
        return {"machine": "CPU", "torch": torch.__version__, "launch_seconds": launch_seconds("cpu")}
    large = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(large)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.copy_(large)
    start.record()
    for _ in range(5):
        other.copy_(large)
    end.record()
    torch.cuda.synchronize()
    return {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "launch_seconds": launch_seconds("cuda"),
        "total_bytes": torch.cuda.mem_get_info()[1],
        "matrix_flops": peak_rate(),
        "copied_bytes_a_second": 5 * 2 * large.numel() / (start.elapsed_time(end) / 1000),
    }


def main() -> None:
    """Measure each setting of the grid, a line of JSON each in --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="Hub name or folder; config and processor are read, no weights")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; must not be there yet")
    parser.add_argument(
        "--seed", type=int, default=24, help="of the settings (default %(default)s, the published grid)"
    )
    parser.add_argument("--steps", type=int, default=5, help="of each setting, two of them to warm up")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th setting")
    parser.add_argument("--only", nargs="+", help="only settings of these methods and precisions, such as nf4 fp16")
    parser.add_argument("--seconds", type=float, help="begin no setting after so many")
    options = parser.parse_args()
    if options.output.exists():
        sys.exit(f"memory_grid.py: {options.output} is there already: choose another --output")
    try:
        vision = is_vision(load_config(options.model))
    except ValueError as error:
        sys.exit(f"memory_grid.py: {error}")
    started = time.monotonic()
    register_packed_attention()
    settings = [
        setting
        for setting in (llava_settings if vision else text_settings)(options.seed)
        if options.only is None or {setting.method, setting.precision} & set(options.only)
    ][:: options.every]
    # One kind of weights after the other: each is drawn once.
    settings.sort(key=lambda setting: (setting.method == "full", setting.method == "nf4", setting.precision))
    weights = Weights(options.model, "cuda" if torch.cuda.is_available() else "cpu")
    processing_class = load_processing_class(options.model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    folder = options.output.with_suffix(".run")
    with options.output.open("x", encoding="utf-8") as file:
        file.write(json.dumps(machine()) + "\n")
        for setting in tqdm(settings, unit="setting"):
            if options.seconds and time.monotonic() - started > options.seconds:
                break
            try:
                measured = measure(setting, weights, processing_class, options.steps, folder)
            except (RuntimeError, ValueError) as error:  # does not fit, or diverges: that is a result
                measured = {**asdict(setting), "model": options.model, "failed": str(error).splitlines()[0][:200]}
            file.write(json.dumps(measured) + "\n")
            file.flush()
            gc.collect()
            free_memory()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
