"""Where a run starts, continues or has ended: every rule of resuming is here."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from finetuning import run_folder, tracking
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.failures import writing
from finetuning.folder_lock import give_back, lock_inside, take_lock
from finetuning.main_process import found_by_main, refuse_together
from finetuning.manifest import write_manifest
from finetuning.model_card import write_run_card
from finetuning.models.adapter_start import write_against_base
from finetuning.models.published_names import publish
from finetuning.preflight.planned_step import beside_plan
from finetuning.preflight.planner import Plan
from finetuning.strategy import Strategy
from finetuning.training import origin
from finetuning.training.activation_checkpointing import kept_choice
from finetuning.training.best_checkpoint import best_metric, kept_step
from finetuning.training.checkpoints import last_whole_checkpoint
from finetuning.training.planned_run import measured_of, note_plan

# May differ between the first start of a run and its continuation: they change what is seen of it, not what it computes.
MAY_CHANGE = {
    "accept_changes", "checkpoint_layers", "config", "ddp_find_unused_parameters", "ddp_timeout", "disable_tqdm", "dry_run", "eval_answers", "eval_max_new_tokens", "eval_on_start", "eval_steps", "eval_strategy",
    "include_num_input_tokens_seen", "log_adapter", "logging_first_step", "logging_steps", "logging_strategy", "log_level",
    "output_dir", "overwrite_completed_run", "per_device_eval_batch_size", "project", "report_to", "run_name",
    "early_stopping_patience", "greater_is_better", "load_best_model_at_end", "metric_for_best_model",
    "skip_bad_rows", "save_steps", "save_strategy", "save_total_limit", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory",
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
    resolved.pop("report_to", None)  # follows from the trackers that are set up
    if resolved.get("max_steps", -1) > 0:
        resolved.pop("num_train_epochs", None)  # has no effect then
    # Enums and paths become what the parser takes.
    return json.loads(json.dumps(resolved, default=str))


def begin(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    plan: Plan | None,
    *,
    skipped_rows: Sequence[dict[str, Any]] = (),
) -> str | None:
    """`start_or_continue` for the arguments of a training; its plan is kept and its trackers are set up.

    Sets `checkpoint_layers` to what the run chose before, and `report_to` to the trackers that there are.
    """
    folder = training_args.output_dir
    script_args.checkpoint_layers = kept_choice(folder, script_args.checkpoint_layers)
    checkpoint = start_or_continue(
        folder,
        resolved_arguments(script_args, training_args, model_args),
        origin.fingerprints(script_args, training_args, model_args, config),
        overwrite_completed=script_args.overwrite_completed_run,
        accept_changes=script_args.accept_changes,
        skipped_rows=skipped_rows,
    )
    note_plan(Path(folder), plan)
    training_args.report_to = tracking.set_up(folder, training_args.run_name, training_args.report_to)
    return checkpoint


def start_or_continue(
    output_dir: str,
    arguments: dict[str, Any],
    fingerprints: dict[str, str],
    *,
    overwrite_completed: bool = False,
    accept_changes: bool = False,
    skipped_rows: Sequence[dict[str, Any]] = (),
) -> str | None:
    """Make the run's folder; the checkpoint to continue from, None for a fresh start.

    A complete run is left as it is, and the process ends with code 0. With `overwrite_completed` its folder is kept under
    another name: nothing finished is ever overwritten. Raises ValueError if the run was begun with other arguments, or
    with other data, base or template (`origin.fingerprints`), unless `accept_changes`: continuing it with those would be
    neither the one run nor the other.
    """
    folder, state = Path(output_dir), PartialState()
    take_lock(folder, "a training", owner_has_ended=is_queued_again(folder))
    metrics = metrics_if_known(folder)
    if metrics.get("completed"):
        if not overwrite_completed:
            leave_complete(folder, metrics, arguments)
        refuse_together(lambda: lock_inside(folder))
        with state.main_process_first():
            if state.is_main_process:
                print(f"The completed run is kept as {run_folder.set_aside(folder)}")
    state.wait_for_everyone()
    checkpoint = found_by_main(lambda: last_whole_checkpoint(folder))
    from_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    refuse_futile_restart(folder, from_step)
    if checkpoint is not None:
        refuse_other_run(folder, checkpoint, arguments)
    changes = found_by_main(lambda: origin.changes(folder, fingerprints)) if checkpoint is not None else []
    if changes and not accept_changes:
        raise ValueError(
            f"{folder}: {'; '.join(changes)}: not what this run was begun with. Continue it with that, give the new run its "
            "own folder with --output_dir, or add --accept_changes true, which begun_with.json will note"
        )
    state.wait_for_everyone()  # all have read what is written now
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_arguments(folder, arguments)
        origin.note(folder, fingerprints, changes)
        if skipped_rows:
            run_folder.write_skipped_rows(folder, skipped_rows)
        run_folder.begin_attempt(folder, from_step)
        if checkpoint is not None:
            print(f"Continuing from {checkpoint}")
    return str(checkpoint) if checkpoint else None


def is_queued_again(folder: Path) -> bool:
    """Whether this process is a later start of the Slurm job that was last here: Slurm has ended the earlier one."""
    attempts = run_folder.read_progress(folder).get("attempts", [])
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and bool(attempts) and attempts[-1].get("job") == job


def metrics_if_known(folder: Path) -> dict[str, Any]:
    """`metrics.json`; empty where it is damaged and a checkpoint is there, from which the run writes it again.

    Raises ValueError for a damaged file without a checkpoint: to begin anew would overwrite a finished run.
    """
    try:
        return run_folder.read_metrics(folder)
    except ValueError as error:
        if run_folder.checkpoints(folder):
            PartialState().print(error)
            return {}
        raise ValueError(
            f"{str(error).partition('. ')[0]}, and no checkpoint is here to write it again from: move {folder} away, or "
            "give the new run its own folder with --output_dir"
        ) from error


def leave_complete(folder: Path, metrics: dict[str, Any], arguments: dict[str, Any]) -> None:
    """End this process with code 0: there is nothing to train. Raises ValueError if the complete run is another one."""
    ways = (
        "Give the new run its own folder with --output_dir, or train it anew with --overwrite_completed_run (the old "
        "folder is kept under another name)"
    )
    before = run_folder.read_arguments(folder)
    if before is not None and (changed := changed_arguments(before, arguments)):
        raise ValueError(f"{folder}: a complete run with other arguments is here ({'; '.join(changed)}). {ways}")
    loss = f", train loss {metrics['train_loss']:.4f}" if "train_loss" in metrics else ""
    PartialState().print(f"{folder}: this run is complete ({metrics['global_step']} steps{loss}). Evaluate it. {ways}")
    sys.exit(0)


def refuse_other_run(folder: Path, checkpoint: Path, arguments: dict[str, Any]) -> None:
    """Raise ValueError that lists why a checkpoint cannot be continued with these arguments and this launch."""
    before = run_folder.read_arguments(checkpoint)  # its copy, which was compared with the manifest
    if before is None:
        return
    problems = continuation_problems(checkpoint, arguments)
    if changed := changed_arguments(before, arguments):
        problems.append(f"this run was begun with other arguments ({'; '.join(changed)})")
    if problems:
        raise ValueError(
            f"{folder}: cannot be continued from {checkpoint.name}: {'; '.join(problems)}. Continue it as it was "
            "begun, or give the new run its own folder with --output_dir"
        )


def changed_arguments(before: dict[str, Any], arguments: dict[str, Any]) -> list[str]:
    """`key: old -> new` of the arguments that change what a run computes."""
    # Where the rows of a step are given, how many a process takes at once computes the same.
    batch = {"per_device_train_batch_size"} if "global_batch_size" in arguments else set()
    epochs = {"num_train_epochs"} if arguments.get("max_steps", -1) > 0 else set()  # kept by older versions
    return run_folder.changed_settings(before, arguments, MAY_CHANGE | batch | epochs)


def refuse_futile_restart(folder: Path, from_step: int) -> None:
    """Raise ValueError when Slurm requeued this job twice and no step was gained: a third time would not gain one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SLURM_RESTART_COUNT" not in os.environ:
        return
    attempts = [
        attempt for attempt in run_folder.read_progress(folder).get("attempts", []) if attempt.get("job") == job
    ]
    if len(attempts) >= 2 and all(attempt["from_step"] == from_step for attempt in attempts[-2:]):
        ended = [attempt.get("reason", "killed without a word") for attempt in attempts[-2:]]
        raise ValueError(
            f"{folder}: job {job} began twice at step {from_step} and got no further ({'; then '.join(ended)}). Look at "
            "the job's log; if time ran out, save more often (save_steps), warn earlier (sbatch --signal=B:USR2@600) or "
            "ask for more time. Submit it anew to go on"
        )


def continuation_problems(checkpoint: Path, arguments: dict[str, Any]) -> list[str]:
    """What of this launch does not fit the checkpoint it would continue from: its strategy, its number of processes.

    `arguments` are the run's. ZeRO-1 and 2 continue each other. ZeRO-3 and FSDP2 that shard frozen layers only
    (`finetuning.distributed.layers_only`) continue each other and DDP, with any number of processes.
    """
    strategy, processes = Strategy.from_environment(), PartialState().num_processes
    names = {path.name for path in checkpoint.iterdir()}
    may_gather = arguments.get("language_model", "lora") == "lora" and arguments.get("fused_lora", True)
    if strategy.shards_weights and may_gather and not strategy.offloads:
        # `refuse_other_layout` is sure
        plain = layout_of(checkpoint) == "one process or DDP"
        strategy = dataclasses.replace(strategy, shards_layers_only=plain)
    if layout_of(checkpoint) != strategy.layout:
        return [said_of_layouts(checkpoint, strategy)]
    was_sharded = weights_were_sharded(checkpoint)
    offloads = "weights" in strategy.offloads
    shards = strategy.shards_weights and (offloads or not may_gather)
    if strategy.is_deepspeed and ((was_sharded and not strategy.shards_weights) or (shards and not was_sharded)):
        was = "sharded, by ZeRO-3" if was_sharded else "full"
        return [
            f"its weights are {was}, and this launch is {strategy}{' with offload' if offloads else ''}: laid out otherwise"
        ]
    before = max(sum(name.startswith("rng_state_") for name in names), 1)
    if before == processes:
        return []
    if strategy.is_deepspeed:
        return [
            f"it was written by {before} processes, these are {processes}: DeepSpeed's state is sharded over {before}"
        ]
    if arguments.get("global_batch_size") is None:
        return [
            f"it was written by {before} processes, these are {processes}, and without global_batch_size in the recipe "
            "each step would take other rows"
        ]
    return []


def layout_of(checkpoint: Path) -> str:
    """Who laid out a checkpoint's optimizer state, as `Strategy.layout`."""
    names = {path.name for path in checkpoint.iterdir()}
    return "DeepSpeed" if "latest" in names else "FSDP2" if "optimizer_0" in names else "one process or DDP"


def said_of_layouts(checkpoint: Path, strategy: Strategy) -> str:
    """That the two differ."""
    began = layout_of(checkpoint)
    return f"it was written under {began}, this launch is {strategy.layout}: its optimizer state is laid out otherwise"


def refuse_other_layout(checkpoint: Path, strategy: Strategy) -> None:
    """Raise ValueError if a launch, whose model is there now, lays optimizer state out otherwise than `checkpoint`."""
    if layout_of(checkpoint) != strategy.layout:
        raise ValueError(f"{checkpoint}: {said_of_layouts(checkpoint, strategy)}. Begin anew in another --output_dir")


def refuse_other_sharding(checkpoint: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if DeepSpeed's `config`, as `set_up_deepspeed` left it, shards weights and `checkpoint` does not.

    Or the other way round.
    """
    was_sharded, is_sharded = weights_were_sharded(checkpoint), config["zero_optimization"]["stage"] == 3
    if was_sharded != is_sharded:
        words = {True: "sharded, as ZeRO-3 does it when it offloads", False: "full"}
        raise ValueError(
            f"{checkpoint}: its trained weights are {words[was_sharded]}, in this launch they are {words[is_sharded]}: "
            "continue it with the file of accelerate_configs/ that it was begun with"
        )


def weights_were_sharded(checkpoint: Path) -> bool:
    """Whether DeepSpeed itself sharded the weights: it then writes a file of them for each process."""
    return any(checkpoint.glob("*/zero_pp_rank_*_model_states.pt"))


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
    folder, state = Path(trainer.args.output_dir), trainer.state
    start = getattr(trainer.accelerator.unwrap_model(trainer.model), "adapter_start", None)
    with writing(folder, SafetensorError):
        trainer.save_model()
        if start is not None and trainer.is_world_process_zero():
            write_against_base(folder, start)
        trainer.save_state()
    if trainer.is_world_process_zero():
        if (folder / "config.json").is_file():  # full weights, that others read as they are
            publish(folder)
        kept = kept_step(trainer.args, state)
        metrics = train_metrics | run_folder.final_metrics(state.log_history, state.global_step, kept)
        planned = run_folder.read_progress(folder).get("planned")
        measured = measured_of(planned, state.log_history)
        if measured:
            metrics |= {"planned": planned, "measured": measured}
        write_manifest(folder, run_folder.files_of_result(folder))
        run_folder.write_metrics(folder, metrics)
        write_run_card(folder)
        run_folder.end_attempt(folder, state.global_step, "completed")
        said = trainer.exam.describe(metrics) if trainer.exam else "no answer was scored while training"
        verdict = f"trained for {state.global_step} steps; {said}"
        if kept is not None:
            name = best_metric(trainer.args)
            verdict = f"kept step {kept} of {state.global_step}, the best by {name} ({state.best_metric:.4f}); {said}"
        print(verdict[:1].upper() + verdict[1:])
        if measured:
            print("  " + beside_plan(planned, measured))
        tracking.close(trainer.args, state, 0, metrics | {"verdict": verdict})
        give_back(folder)
        kind = "llava" if hasattr(trainer.processing_class, "tokenizer") else "gemma"
        # Where it is, its score, what to do next: the last line.
        print(
            f"{folder}: {said.partition(':')[0]}. Next: python scripts/evaluate_{kind}.py --run {shlex.quote(str(folder))}"
        )
