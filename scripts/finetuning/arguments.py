"""Arguments of the training commands: TRL's own, plus the few fields that TRL lacks. Unknown keys are errors."""

import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from trl import ModelConfig, SFTConfig, TrlParser

from finetuning.command_line import FLAGS, list_flags, parse_mixer, read_command
from finetuning.device import (
    choose_precision,
    compute_capability,
    launched_precision,
    refuse_more_processes_than_gpus,
)
from finetuning.strategy import divide_batch
from finetuning.tracking import refuse_unknown_trackers

PLACEMENTS = ["frozen", "lora", "full"]


def setting(default: Any, help: str, *, choices: list[str] | None = None) -> Any:
    """A field of a dataclass that is a flag: its default, what `--help` says, and what it may be."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices else {}))


@dataclass
class ScriptArguments:
    """Which data, and what is trained."""

    dataset_name: str = field(metadata={"help": "Folder that data_prep wrote, or a Hub dataset with the same columns."})
    dataset_mixer: dict | str | None = setting(  # noqa: RUF009 - makes a field
        None,
        "Other prepared folders or Hub datasets whose training rows are mixed in, with a weight each: "
        '{"data/general": 0.2} takes a fifth of its rows, 2 takes each twice.',
    )
    dataset_train_split: str = setting("train", "Split to train on.")
    dataset_validation_split: str = setting("validation", "Split to evaluate on while training.")
    task: str | None = setting(
        None,
        "How answers are scored: count, yes_no, choice, short_answer, number or free_text. Unset: what the "
        "column task says, else what the train answers look like.",
    )
    language_model: str = setting("lora", "How the language model is trained.", choices=PLACEMENTS)
    projector: str = setting("frozen", "How the projector is trained.", choices=PLACEMENTS)
    vision_tower: str = setting("frozen", "How the vision tower is trained.", choices=PLACEMENTS)
    image_aspect_ratio: str = setting(
        "pad",
        "pad: the whole picture, made square with the mean colour, as LLaVA-1.5 was trained; crop: its "
        "centre square, as the published processor does (a 4:3 frame loses a quarter of its people).",
        choices=["pad", "crop"],
    )
    image_max_tiles: int | None = setting(
        None, "LLaVA-NeXT, OneVision: tiles of a picture at most; fewer cost less and see less. Unset: all."
    )
    image_tiles: str | None = setting(
        None,
        "LLaVA-1.5, ViP-LLaVA: show each picture whole and in COLUMNSxROWS tiles, as several pictures of its row; 2x2 "
        "costs five times the image tokens and sees small people. Unset: whole only.",
    )
    image_augmentation: list[str] | None = setting(  # noqa: RUF009 - makes a field
        None,
        "Change training pictures at random, anew in each epoch: flip (mirrored), brightness, blur, shift (a little "
        "smaller, elsewhere in its frame). Nothing is cut off. flip is refused where texts say left or right. Unset: none.",
        choices=["flip", "brightness", "blur", "shift"],
    )
    number_loss: str | None = setting(
        None,
        "Added to cross entropy where answers are counts: crps, the ranked probability score of the model's "
        "distribution over all counts, in people; ntl, the number token loss, of digits one by one. Unset: none.",
        choices=["crps", "ntl"],
    )
    number_loss_weight: float = setting(0.3, "What number_loss is multiplied by.")
    eval_answers: int = setting(64, "Validation rows that are answered and scored at each evaluation; 0 for none.")
    eval_max_new_tokens: int = setting(32, "Longest answer at an evaluation, in tokens.")
    log_adapter: bool = setting(False, "Store the finished run's adapter in W&B, as an artifact.")
    fused_lora: bool = setting(
        True, "Compute LoRA in fewer passes over memory; false: PEFT's own code, which computes the same."
    )
    base_precision: str | None = setting(
        None,
        "int8: products with the language model's frozen weights run in INT8 forward, and gradients pass in FP8, on compute "
        "capability 9.0 (H100, H200), in the memory of 16 bits. fp8_backward: gradients alone pass through them, in FP8, from 8.9 on, for one byte more a "
        "weight. Unset: 16 bits.",
        choices=["fp8_backward", "int8"],
    )
    checkpoint_layers: str = setting(
        "auto",
        "Decoder layers computed again in the backward pass to save memory: auto (the fewest that fit the "
        "GPU), all, or a number. Needs gradient_checkpointing: true; without it none are.",
    )
    cuda_graphs: bool = setting(
        False,
        "Text models: launch each pass as one CUDA graph, several times as fast where steps are so small that the "
        "GPU waits for the host. Needs LoRA on one GPU, and the memory to checkpoint no layer.",
    )
    share_image_prefix: bool | None = setting(
        None,
        "Train all dialogues about an image as one sequence, which pays for the image once; a batch then "
        "counts images. Unset: where an image has several dialogues.",
    )
    accept_changes: bool = setting(
        False,
        "Continue a run although its data, its base model or its template are no longer those that it was "
        "begun with; begun_with.json notes it.",
    )
    skip_bad_rows: int = setting(
        0,
        "Pass over at most so many rows whose pictures do not decode; the next row stands in for each. They are "
        "looked for before the start, and kept in skipped_rows.json. 0: the first one ends the training.",
    )
    dry_run: bool = setting(
        False,
        "Check everything, pass the longest batch through the model without its weights, print the plan, and end.",
    )
    overwrite_completed_run: bool = setting(False, "Train a completed run anew; its folder is kept under another name.")

    def __post_init__(self):
        self.checkpoint_layers = str(self.checkpoint_layers)  # a recipe's 8 is a number
        if isinstance(self.image_augmentation, str):  # a recipe's one kind, which need not be a list
            self.image_augmentation = [self.image_augmentation]
        self.dataset_mixer = parse_mixer(self.dataset_mixer, self.dataset_name)

    @property
    def placement(self) -> dict[str, str]:
        """Part of the model -> how it is trained."""
        return {part: getattr(self, part) for part in ("language_model", "projector", "vision_tower")}


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's SFTConfig; precision follows the GPU unless the recipe says, and only answers are supervised."""

    global_batch_size: int | None = setting(
        None,
        "Rows a step, over all processes. Set, the recipe computes the same on any number of GPUs: "
        "per_device_train_batch_size is then the most that one GPU takes at once, and accumulation follows.",
    )
    early_stopping_patience: int | None = setting(
        None, "Stop after so many evaluations without a better metric_for_best_model; unset: train to the end."
    )
    bf16: bool | None = setting(None, "bf16 mixed precision; unset: follows the GPU.")
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "mlflow, trackio: trackers beside TensorBoard, and W&B where it is set up."},
    )
    max_length: int | None = setting(None, "Longest row in tokens; unset: nothing is cut (a cut image cannot be used).")
    learning_rate_projector: float | None = setting(
        None, "Learning rate of the projector; unset: learning_rate. LLaVA's recipe: a tenth."
    )
    learning_rate_vision_tower: float | None = setting(None, "Learning rate of the vision tower; unset: learning_rate.")
    lora_plus_ratio: float | None = setting(
        None, "LoRA+: how many times the rate of A the matrices B learn with; 16 in its paper. Unset: 1."
    )
    truncate: bool = setting(
        False, "Cut rows of text that are longer than max_length; without it they are refused by number."
    )
    assistant_only_loss: bool = setting(True, "Supervise the assistant's turns only.")
    logging_nan_inf_filter: bool = setting(
        False, "A loss that is not finite stops the run; looking for one again would stall the GPU."
    )

    dataloader_persistent_workers: bool = setting(
        True, "Loader processes live on from epoch to epoch, and read the next one's first batches ahead."
    )
    ddp_broadcast_buffers: bool = setting(
        False,
        "DDP: send the first process's buffers to all before each forward pass. Nothing changes them here, and "
        "the processes would wait for each other.",
    )
    ddp_bucket_cap_mb: int | None = setting(
        200, "DDP: gradients averaged in one message. Each message slows the products beside it: few are best."
    )

    @property
    def evaluates_its_checkpoints(self) -> bool:
        """Whether every checkpoint is saved at a step with an evaluation: without, no checkpoint is known to be the best."""
        if self.save_strategy == "best":
            return self.eval_strategy != "no"
        if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
            return False
        every, saved = self.eval_steps or self.logging_steps, self.save_steps
        # Shares of all steps below 1, as whole millionths; steps otherwise.
        return self.eval_strategy == "epoch" or (
            (every < 1) == (saved < 1) and round(saved * 1_000_000) % round(every * 1_000_000) == 0
        )

    def __post_init__(self):
        self.cpu_is_asked_for = self.use_cpu or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
        capability = None if self.cpu_is_asked_for else compute_capability()
        self.use_cpu = capability is None
        if not self.dataloader_num_workers:
            self.dataloader_persistent_workers = False  # there are none
        if not self.use_cpu:
            refuse_more_processes_than_gpus()
        self.fp16, self.bf16 = choose_precision(*launched_precision(self.fp16, self.bf16), capability)
        # What transformers would take where both are off.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16" if self.fp16 else "bf16" if self.bf16 else "no"
        if self.tf32 is None and capability is not None:
            self.tf32 = capability >= (8, 0)
        if self.accelerator_config is None and not self.use_cpu:
            # A blocking copy of the next rows waits for the whole step before them, and the GPU then for the next one.
            self.accelerator_config = {"non_blocking": True}
        # Refused by transformers where it cannot be; `training/best_checkpoint.py` says what is kept then.
        keeps_best = self.load_best_model_at_end
        self.load_best_model_at_end = keeps_best and self.evaluates_its_checkpoints
        super().__post_init__()
        self.load_best_model_at_end = keeps_best
        if self.global_batch_size is not None:
            if self.gradient_accumulation_steps != 1:
                raise ValueError(
                    f"global_batch_size: {self.global_batch_size} decides how often gradients are accumulated: remove "
                    f"gradient_accumulation_steps: {self.gradient_accumulation_steps}, or remove global_batch_size"
                )
            self.per_device_train_batch_size, self.gradient_accumulation_steps = divide_batch(
                self.global_batch_size, self.per_device_train_batch_size, self.world_size
            )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's ModelConfig; weights follow the run's precision unless the recipe says."""

    dtype: str | None = setting(
        "auto",
        "Type of the base weights; auto: the 16-bit type of the run, float32 where they are trained.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    init_lora_weights: str | None = setting(
        None,
        "How LoRA begins. Unset: A random, B zero; gaussian, orthogonal: PEFT's other draws; pissa, "
        "pissa_niter_16 (faster), olora: from the base's largest directions, saved as plain LoRA of twice the rank; eva: A "
        "from the largest directions of what layers read in rows of the run.",
        choices=["gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva"],
    )


def dataclass_parser() -> TrlParser:
    """TRL's parser of the three dataclasses, for recipes and flags."""
    return TrlParser((ScriptArguments, TrainingArguments, ModelArguments), allow_abbrev=False)


def parse_arguments(
    default_recipe: Path, argv: list[str] | None = None
) -> tuple[ScriptArguments, TrainingArguments, ModelArguments]:
    """Recipe (`--config FILE`, `default_recipe` when none is named) overridden by the command line.

    Raises ValueError with all that is wrong.
    """
    argv, _ = read_command(default_recipe, sys.argv[1:] if argv is None else argv)
    groups = dataclass_parser().parse_args_and_config(argv)
    refuse_unknown_trackers(groups[1].report_to)
    return groups


if __name__ == "__main__":  # PYTHONPATH=scripts python -m finetuning.arguments: a pin or a field has changed
    FLAGS.write_text(list_flags(dataclass_parser(), {name: version(name) for name in ("transformers", "trl")}), "utf-8")
