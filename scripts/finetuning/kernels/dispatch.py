"""Which of the two runs: the Triton kernel on a CUDA device, or the plain-torch reference beside it.

A kernel reads and writes each element once, where autograd's chain of small operations does so five to ten times. Both
compute in fp32 (the reference of fp64 in fp64) and round once at the end. `quick_gelu` alone rounds as inference does.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton is installed, as with the CUDA build of torch, and `tensor` is on a CUDA device."""
    return triton is not None and tensor.is_cuda


def upcast(tensor: Tensor) -> Tensor:
    """To fp32 at least: fp64 stays fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
