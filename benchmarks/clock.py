"""What every way of training is measured by; Unsloth's environment, which has other versions, imports it too."""

import gc
import time
from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback

GIB = 2**30


class Clock(TrainerCallback):
    """Time and memory of the steps after the warm-up; `step_done` is called after each step."""

    def __init__(self, warmup: int, step_done: Callable[[], object]):
        self.warmup, self.step_done = warmup, step_done

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Start the clock when the warm-up is over."""
        self.step_done()
        if state.global_step == self.warmup:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop the clock when the GPU has finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started

    def measured(self, trainer: Trainer) -> dict:
        """Seconds of the measured steps, the most GiB allocated in them, mean tokens of a step, logged losses."""
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        last = history[-1]
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        return {
            "trained_parameters": sum(weight.numel() for weight in trained),
            "trained_types": sorted({str(weight.dtype) for weight in trained}),
            "seconds": self.seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            # Up to the last log, after which there may have been other steps.
            "tokens_a_step": last["num_tokens"] / last["step"] if "num_tokens" in last else None,
            "data_wait": last.get("data_wait"),
            "loss_steps": [entry["step"] for entry in history],
            "losses": [entry["loss"] for entry in history],
        }


def limit_memory(gib: float | None, elsewhere: int = 0) -> None:
    """Hold this process to `gib` of the GPU's memory, its CUDA context included; None takes a limit away.

    `elsewhere` bytes of the GPU are another process's.
    """
    if not torch.cuda.is_available():
        return
    free_memory()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved() - elsewhere
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else (gib * GIB - context) / total)


def free_memory() -> None:
    """Give back what the run before held on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
