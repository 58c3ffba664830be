"""Runs a training command of `scripts/` and notes what its last step sends between GPUs, and how long they wait for it.

    accelerate launch --config_file accelerate_configs/ddp.yaml benchmarks/messages.py scripts/train_llava.py --max_steps 21

One step is profiled, the last: its speed is in no log of the recipes. Process 0 writes `messages.json` into the run's folder:
bytes that a process sends over a ring, the step's milliseconds, those in which the GPU ran nothing but a message, and those in
which it ran nothing.
"""

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

# What each process of n sends over a ring, of the bytes of the larger side (NVIDIA nccl-tests, PERFORMANCE.md).
SHARES = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "broadcast": 1}
BYTES = {"Float": 4, "BFloat16": 2, "Half": 2, "Byte": 1, "Int": 4, "Long": 8, "Double": 8, "Float8_e4m3fn": 1}


class LastStep(TrainerCallback):
    """Profiles the last step of a training."""

    def __init__(self) -> None:
        self.profiler: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = profile(activities=activities)
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.profiler:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.profiler.stop()
        if state.is_world_process_zero:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                self.profiler.export_chrome_trace(str(trace))
                events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            Path(args.output_dir, "messages.json").write_text(json.dumps(summarise(events)) + "\n", encoding="utf-8")
        self.profiler = None


def summarise(events: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """Of a Chrome trace of one step: `bytes_sent`, `step_ms`, `message_ms`, `waiting_ms`, `idle_ms` (None without a GPU)."""
    messages = [event["args"] for event in events if event.get("name") == "record_param_comms"]
    sent = round(sum(map(bytes_sent, messages))) if messages else None  # gloo, on CPUs, records none
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return {"bytes_sent": sent, "step_ms": None, "message_ms": None, "waiting_ms": None, "idle_ms": None}
    ran = {True: [], False: []}
    for event in kernels:
        ran[event["name"].startswith("nccl")].append(event)
    everything = joined(kernels)
    return {
        "bytes_sent": sent,
        "step_ms": round((everything[-1][1] - everything[0][0]) / 1000, 2),
        "message_ms": round(length(joined(ran[True])) / 1000, 2),
        "waiting_ms": round((length(everything) - length(joined(ran[False]))) / 1000, 2),
        "idle_ms": round((everything[-1][1] - everything[0][0] - length(everything)) / 1000, 2),
    }


def length(intervals: list[tuple[float, float]]) -> float:
    """Their sum."""
    return sum(end - start for start, end in intervals)


def bytes_sent(message: dict[str, Any]) -> float:
    """Bytes that one process sends for a collective, by the ring's formula; 0 for what moves no tensor (a barrier)."""
    name, processes = message.get("Collective name", "").strip("_"), message.get("Group size", 1)
    share = next((share for key, share in SHARES.items() if key in name.replace("all_", "all")), 0)
    elements = max(message.get("In msg nelems", 0), message.get("Out msg nelems", 0))
    return share * elements * BYTES.get(message.get("dtype", ""), 0) * (processes - 1) / processes


def joined(events: Any) -> list[tuple[float, float]]:
    """Intervals (start, end) in microseconds in which at least one of the events ran, in order."""
    intervals: list[tuple[float, float]] = []
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        if intervals and start <= intervals[-1][1]:
            intervals[-1] = intervals[-1][0], max(end, intervals[-1][1])
        else:
            intervals.append((start, end))
    return intervals


if __name__ == "__main__":
    transformers_trainer.DEFAULT_CALLBACKS.append(LastStep)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
