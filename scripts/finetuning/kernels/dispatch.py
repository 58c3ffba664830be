"""Plain torch, or the Triton kernel beside it: every kernel of this folder is both.

The plain version is the reference, and runs on CPUs. On a CUDA device with Triton the kernel of the same name takes over,
which reads and writes each number once (autograd's chain of small operations reads them five to ten times). Everything is
computed in fp32 (fp64 stays fp64 in plain torch) and rounded once at the end, but for the activation of a frozen vision
tower.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def runs_triton(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda


def upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
