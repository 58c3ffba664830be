"""What the GPU (or the lack of one) decides: precision, types of weights, how many processes fit, the smallest memory."""

import os
from pathlib import Path

import torch
from accelerate import PartialState


def open_processes() -> PartialState:
    """The processes of this launch, on GPUs or not; called before anything else asks for them.

    `PartialState()` alone knows MULTI_GPU launches with CUDA only: without a GPU each of two processes would take itself for
    the only one, and write every answer again (accelerate 1.15).
    """
    return PartialState(cpu=compute_capability() is None)


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of this process's CUDA device, None without one. A T4 is (7, 5), an A100 (8, 0), an H200 (9, 0)."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_precision(fp16: bool, bf16: bool | None, capability: tuple[int, int] | None) -> tuple[bool, bool]:
    """What the recipe asks for and what the device has -> (fp16, bf16) of mixed-precision training.

    Nothing asked: bf16 from capability 8.0 (Ampere) on, fp16 with loss scaling below it. On a CPU always fp32: its
    fp16 products are slower than fp32, and a recipe written for a GPU should still run there. Raises ValueError for
    bf16 below 8.0, where it is emulated, slowly, or missing (LLaVA-NeXT#224, unsloth#7506).
    """
    if capability is None:
        return False, False
    if fp16 and bf16:
        raise ValueError("fp16 and bf16 are both on: keep one, or neither to follow the GPU")
    if bf16 and capability < (8, 0):
        raise ValueError(
            f"bf16 is on, but this GPU has compute capability {capability[0]}.{capability[1]} and bf16 needs 8.0 "
            "(Ampere) or newer: remove bf16 from the recipe (fp16 is then chosen) or set fp16: true"
        )
    if fp16 or bf16:
        return fp16, bool(bf16)
    return capability < (8, 0), capability >= (8, 0)


def launched_precision(fp16: bool, bf16: bool | None) -> tuple[bool, bool | None]:
    """(fp16, bf16) of the recipe, and of `accelerate launch` (its file or --mixed_precision) where the recipe is silent.

    Raises ValueError where the two say different things.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched == "no":
        return fp16, bf16
    asked = "fp16" if fp16 else "bf16" if bf16 else launched
    if launched not in ("fp16", "bf16") or asked != launched:
        raise ValueError(f"the launch says mixed_precision: {launched}, the recipe {asked}: keep one, fp16 or bf16")
    return launched == "fp16", launched == "bf16"


def weight_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    """Type that frozen base weights are held in: the 16-bit type of the run, fp32 where there is none."""
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def inference_dtype() -> torch.dtype:
    """Type to ask a model questions in on this device."""
    return weight_dtype(*choose_precision(False, None, compute_capability()))


def refuse_more_processes_than_gpus() -> None:
    """Raise ValueError where this machine's processes outnumber its GPUs; CUDA would say `invalid device ordinal`."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus > 0:
        raise ValueError(
            f"{processes} processes on this machine, but it shows {gpus} GPUs: launch with --num_processes {gpus} (for "
            "each machine), or look at CUDA_VISIBLE_DEVICES and at what the scheduler granted"
        )


def smallest_gpu() -> int | None:
    """Bytes of memory of the smallest GPU that this machine's processes use; None without one."""
    used = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(index).total_memory for index in range(used)), default=None)


def main_memory() -> int:
    """Bytes of this machine's main memory, or of what its control group (a container, a Slurm job) may have."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return installed
    return min(installed, int(limit)) if limit.isdecimal() else installed
