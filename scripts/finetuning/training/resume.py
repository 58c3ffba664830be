"""The run's folder: where a run starts, continues or has ended, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from finetuning import run_folder as progress
from finetuning import tracking
from finetuning.preflight.checks import continuation_problems
from finetuning.training.checkpoints import last_whole_checkpoint

# May differ between the first start of a run and its continuation: they change what is seen of it, not what it computes.
MAY_CHANGE = {
    "checkpoint_layers", "config", "ddp_find_unused_parameters", "ddp_timeout", "disable_tqdm", "eval_answers", "eval_max_new_tokens", "eval_on_start", "eval_steps", "eval_strategy",
    "include_num_input_tokens_seen", "log_adapter", "logging_first_step", "logging_steps", "logging_strategy", "log_level",
    "output_dir", "overwrite_completed_run", "per_device_eval_batch_size", "project", "report_to", "run_name",
    "save_steps", "save_strategy", "save_total_limit", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "restore_callback_states_from_checkpoint",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
}  # fmt: skip


def resolved_arguments(*groups: Any) -> dict[str, Any]:
    """All arguments of a run as plain YAML values, without secrets, in a form that `--config` reads back."""
    resolved = {}
    for group in groups:
        values = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        known = {field.name for field in dataclasses.fields(group) if field.init}
        resolved |= {
            key: value
            for key, value in values.items()
            if key in known and value is not None and "token" not in key.split("_") and not str(value).startswith("<")
        }
    if "global_batch_size" in resolved:
        resolved.pop("gradient_accumulation_steps", None)  # follows from it and the number of processes
    # Enums and paths become what the parser takes.
    return json.loads(json.dumps(resolved, default=str))


def start_or_continue(output_dir: str, arguments: dict[str, Any], *, overwrite_completed: bool) -> str | None:
    """Make the run's folder; the checkpoint to continue from, None for a fresh start.

    Raises ValueError if the run is complete, or if it was begun with other arguments: continuing it with those
    would be neither the one run nor the other. A completed run that is to be trained anew keeps its folder under
    another name: nothing finished is ever overwritten.
    """
    folder = Path(output_dir)
    metrics = read_metrics(folder)
    if metrics.get("completed"):
        if not overwrite_completed:
            raise ValueError(
                f"{folder}: this run is complete ({metrics['global_step']} steps, train loss {metrics['train_loss']:.4f}). "
                "Evaluate it, give the new run its own folder with --output_dir, or train it anew with "
                "--overwrite_completed_run (the old folder is kept under another name)"
            )
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                number = 1
                while (kept := folder.with_name(f"{folder.name}.previous-{number}")).exists():
                    number += 1
                folder.rename(kept)
                print(f"The completed run is kept as {kept}")
    PartialState().wait_for_everyone()
    checkpoint = last_whole_checkpoint(folder)
    from_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    progress.refuse_futile_restart(folder, from_step)
    saved = folder / "arguments.yaml"
    if checkpoint is not None and saved.is_file():
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
        # Where the rows of a step are given, how many a process takes at once computes the same.
        may_change = MAY_CHANGE | ({"per_device_train_batch_size"} if "global_batch_size" in arguments else set())
        changed = [
            f"{key}: {before.get(key)} -> {arguments.get(key)}"
            for key in sorted(before.keys() | arguments.keys())
            if key not in may_change and before.get(key) != arguments.get(key)
        ]
        problems = continuation_problems(checkpoint, arguments)
        if changed:
            problems.append(f"this run was begun with other arguments ({'; '.join(changed)})")
        if problems:
            raise ValueError(
                f"{folder}: cannot be continued from {checkpoint.name}: {'; '.join(problems)}. Continue it as it was "
                "begun, or give the new run its own folder with --output_dir"
            )
    PartialState().wait_for_everyone()  # all have read what is written now
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(yaml.safe_dump(arguments, allow_unicode=True, sort_keys=True), encoding="utf-8")
        progress.begin_attempt(folder, from_step)
        if checkpoint is not None:
            print(f"Continuing from {checkpoint}")
    return str(checkpoint) if checkpoint else None


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a run; empty when training has not ended."""
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_run(trainer: Any) -> str:
    """What follows from the arguments, for people: once, before the first step."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    validation = f", {len(trainer.eval_dataset):,} to validate" if trainer.eval_dataset is not None else ""
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    return (
        f"  {len(trainer.train_dataset):,} rows to train on{validation}\n"
        f"  batch of {batch}: {args.per_device_train_batch_size} a process x {processes} process{'es' if processes > 1 else ''} x "
        f"{args.gradient_accumulation_steps} accumulated; {precision} on {trainer.accelerator.device.type}, {trainer.strategy}"
    )


def finish(trainer: Any, train_metrics: dict[str, float]) -> None:
    """Save the weights, the processor, the trainer's state and the metrics; the metrics last: they say `completed`."""
    folder = Path(trainer.args.output_dir)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        metrics = dict(train_metrics)
        for entry in trainer.state.log_history:  # the last evaluation wins
            metrics |= {key: value for key, value in entry.items() if key.startswith("eval_")}
        metrics |= {"global_step": trainer.state.global_step, "completed": True}
        unfinished = folder / "metrics.json.unfinished"
        unfinished.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.rename(folder / "metrics.json")
        progress.end_attempt(folder, trainer.state.global_step, "completed")
        tracking.close(trainer.args, trainer.state, 0, metrics)
