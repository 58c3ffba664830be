#!/usr/bin/env bash
# One would guess: importing bitsandbytes loads its CUDA library and little more.
# Seen: functions for devices without kernels of their own are decorated with torch.compile at import, which loads
# torch._inductor: 181 modules of PyTorch's compiler. PEFT imports bitsandbytes wherever it is installed, so every
# start pays for it.
# Versions: torch 2.13.0, bitsandbytes 0.50.2; torch is the CPU build where pip finds one. Python 3.11.
# Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/backends/default/ops.py
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "bitsandbytes")), sep=", ")
import sys

import torch  # noqa: F401


def of_compiler() -> int:
    return sum(name.split(".")[:2] == ["torch", "_inductor"] for name in sys.modules)


before = of_compiler()
import bitsandbytes  # noqa: E402, F401

print("modules of torch._inductor:", before, "after importing torch,", of_compiler(), "after bitsandbytes")
assert before == 0 and "torch._inductor.compile_fx" in sys.modules
PYTHON
