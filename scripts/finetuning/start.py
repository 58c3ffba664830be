"""The seconds before a command computes: what goes on beside its imports, what they leave out, and where the time went.

Standard library only at import.
"""

import ctypes
import gc
import importlib
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from finetuning.command import is_main_process
from finetuning.fingerprints import hash_ahead

COMPILER_OFF = "TORCHDYNAMO_DISABLE"
_ended: dict[str, float] = {}  # part of the start -> seconds from the command to its end


def prepare(base: str | None = None, *, engine: str = "built-in") -> None:
    """Called before the first import of PyTorch: begins to hash the base model, opens the GPU, imports bitsandbytes.

    Without PyTorch's compiler: bitsandbytes 0.50 wraps four functions in `torch.compile` as it is imported, PEFT imports it
    for every LoRA, and all of the compiler is loaded with it, a seventh of all imports. The four serve neither CUDA nor
    CPUs, which have functions of their own. Nobody looks for garbage until `imported`: imports leave none.
    """
    if "torch" not in sys.modules:
        gc.disable()
    if base is not None and is_main_process():
        hash_ahead(base)
    if engine != "vllm":  # which forks processes that open it themselves
        threading.Thread(target=open_gpu, daemon=True).start()
    before = os.environ.get(COMPILER_OFF)
    os.environ[COMPILER_OFF] = "1"
    try:
        with suppress(ImportError):  # who quantises nothing can do without
            importlib.import_module("bitsandbytes")
    finally:
        del os.environ[COMPILER_OFF]
        if before is not None:
            os.environ[COMPILER_OFF] = before


def open_gpu() -> None:
    """Start the CUDA driver and this process's context, which PyTorch then finds; nothing on a machine without a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def imported() -> None:
    """Called when the imports have ended; what they made is left out of every later search for garbage."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    ended("imports")


def seconds() -> float:
    """Seconds since this process was started (Linux: field 22 of /proc/self/stat, in ticks since the boot)."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def ended(part: str) -> None:
    """Note that a part of a training's start has ended, the first time that it does."""
    if part not in _ended:
        _ended[part] = seconds()


def told() -> str:
    """Seconds from the command to here, and of each part; once, and of a command that noted its imports: else empty."""
    if "imports" not in _ended or "told" in _ended:
        return ""
    ends = list(_ended.items())
    parts = [f"{part} {end - begin:.1f}" for (part, end), (_, begin) in zip(ends, [("", 0.0), *ends], strict=False)]
    ended("told")
    return f"{ends[-1][1]:.1f} s from the command to its first step: {', '.join(parts)}"
