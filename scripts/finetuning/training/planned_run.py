"""What was planned of a run, beside what it did: refused before weights are loaded, said first, compared at the end."""

import dataclasses
import datetime
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState

from finetuning import run_folder
from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.preflight.planner import Plan, bits_of, make_plan, read_workload
from finetuning.preflight.step_memory import GIB
from finetuning.preflight.step_time import gpu_named
from finetuning.strategy import Strategy

WARM_BURSTS, BURSTS, BURST = (
    5,
    15,
    200,
)  # of small operations: what a queue of launches takes without waiting for the GPU
SURE = 1.03  # a plan is at most so much too high: what it says does not fit is refused beyond


def plan_run(script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments) -> Plan | None:
    """The plan of this launch on this process's GPU, said on the first line; None where there is none, which is said too.

    Raises ValueError where a step cannot fit, with what could. Plans of sharded weights are not sure enough to refuse by.
    """
    if training_args.use_cpu or not torch.cuda.is_available():
        return None
    shown = PartialState().print
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = gpu_named(properties.name, properties.total_memory)
    if gpu is not None:  # a process may have been given a part of it
        gpu = dataclasses.replace(gpu, memory=gpu.memory * torch.cuda.get_per_process_memory_fraction())
    groups = (script_args, training_args, model_args)
    settings = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    settings |= {"optim": training_args.optim.value, "eval_strategy": training_args.eval_strategy.value}
    settings["global_batch_size"] = None  # divided already
    try:
        if gpu is None:
            raise ValueError(f"{properties.name} is not in scripts/gpus.yaml")
        plan = make_plan(read_workload(settings), gpu, Strategy.from_environment(), bits=bits_of(settings))
    except ValueError as error:
        shown(f"  no plan of time and memory: {error}")
        return None
    if plan.training.strategy.replicates and plan.allocated > SURE * gpu.memory:
        raise ValueError(
            f"memory: a step needs about {plan.allocated / GIB:.1f} GiB on each GPU, which has {gpu.memory / GIB:.1f}, with "
            f"{plan.training.checkpointed} of {plan.training.shape.text.layers} layers checkpointed: set a smaller "
            "per_device_train_batch_size (global_batch_size keeps the rows of a step), load_in_4bit: true, or ask "
            "scripts/plan.py what fits"
        )
    shown(first_line(plan, datetime.datetime.now()))
    return plan


def launch_seconds(device: str) -> float:
    """Seconds that this host takes for one small operation of a training pass, its launch on `device` included; 0.1 s to measure."""
    weight = torch.zeros(8, 8, device=device)
    times = []
    for _ in range(WARM_BURSTS + BURSTS):
        state = torch.zeros(8, 8, device=device, requires_grad=True)
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        output = state
        for _ in range(BURST // 2):
            output = torch.nn.functional.linear(output, weight) + output
        output.sum().backward()
        times.append((time.perf_counter() - started) / BURST)
    return median(times[WARM_BURSTS:])


def first_line(plan: Plan, now: datetime.datetime) -> str:
    """When the run will end, and what it will need."""
    end = now + datetime.timedelta(seconds=plan.seconds)
    return (
        f"  planned: {plan.steps:,} steps of {plan.step_seconds:.2f} s, to end about {end:%Y-%m-%d %H:%M} after the weights are "
        f"loaded; {plan.allocated / GIB:.1f} of {plan.gpu.memory / GIB:.1f} GiB at the peak"
    )


def note_plan(folder: Path, plan: Plan | None) -> None:
    """Keep the plan in `progress.json`, for `status.py` and for the comparison at the end."""
    if plan is None or not PartialState().is_main_process:
        return
    packs = plan.training.packs_rows
    planned = {
        "seconds_per_step": round(plan.step_seconds, 4),
        "peak_memory_gib": round(plan.allocated / GIB, 2),
        "seconds": round(plan.seconds),
        # What `samples_per_second` counts in a step: sequences of packed rows, else rows.
        "samples_per_step": (1 if packs else plan.batch.rows) * plan.accumulation * plan.processes,
    }
    run_folder.write_progress(folder, run_folder.read_progress(folder) | {"planned": planned})


def measured_of(planned: dict[str, float] | None, log_history: list[dict[str, Any]]) -> dict[str, float]:
    """`seconds_per_step` (median of the logs but the first) and `peak_memory_gib` of a run; empty without a plan or a log."""
    logs = [entry for entry in log_history if "samples_per_second" in entry]
    if not planned or not logs:
        return {}
    rate = median(entry["samples_per_second"] for entry in logs[1:] or logs)
    measured = {"seconds_per_step": round(planned["samples_per_step"] / rate, 4)}
    peaks = [entry["peak_memory_gib"] for entry in logs if "peak_memory_gib" in entry]
    return measured | ({"peak_memory_gib": max(peaks)} if peaks else {})
