"""The Triton kernels compute what the plain torch beside them does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetuning.kernels import dropout, fp8, gated_mlp, int8, nf4, quick_gelu, rms_norm, rotary
from finetuning.kernels.nf4 import dequantize_4bit

MODULES = (dropout, fp8, gated_mlp, int8, nf4, quick_gelu, rms_norm, rotary)


def kernel_cases() -> dict[str, tuple[torch.Tensor, ...]]:
    """Name -> result of each function on the same numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 40), torch.randn(40)
    grad, residual = torch.randn(6, 40), torch.randn(6, 40)
    gate_up, grad_activated = torch.randn(6, 2 * 24), torch.randn(6, 24)
    cos, sin = torch.randn(1, 3, 12), torch.randn(1, 3, 12)
    qkv = torch.randn(2, 3, (3 + 2 + 2) * 12)
    wide = torch.zeros(6, 50)  # rows that lie apart
    packed = torch.randint(256, (120, 1), dtype=torch.uint8)  # blocks of 8 numbers in rows of 40
    scales, code = torch.rand(30), torch.randn(16)
    in_int8 = tuple(map(int8.quantize_rows_to_int8, (torch.randn(70, 384), torch.randn(40, 384))))
    rows_in_int8 = int8.quantize_rows_to_int8(torch.randn(6, 300)[:, :256])
    x_a, b, blocks = torch.randn(70, 16), torch.randn(16, 40), torch.zeros(40, 16)
    blocks[:24, :8], blocks[24:, 8:] = 1.0, 2.0
    spans = torch.tensor([[0, 8]] * 24 + [[8, 16]] * 16, dtype=torch.int32)
    rotated = rotary.split_and_rotate(qkv, cos, sin, (3, 2))
    rows_apart = torch.zeros(6, 90)
    rotary.split_and_rotate_backward(*rotated, cos, sin, rows_apart[:, :84])
    cases = {
        "rms_norm": (rms_norm.rms_norm(hidden, weight, 1.0, 1e-5, wide[:, :40]), wide[:, 40:]),
        "rms_norm_backward": rms_norm.rms_norm_backward(hidden, weight, 0.0, 1e-5, grad, residual),
        "rotate": rotated,
        "rotate_backward": (rows_apart,),
        "drop": (dropout.hashed_dropout(hidden, torch.tensor([2**31 - 3, 12345]), 0.4),),
        "drop of rows that lie apart": (dropout.hashed_dropout(wide[:, :40], torch.tensor([2**31 - 3, 12345]), 0.4),),
        "dequantize_4bit": (dequantize_4bit(packed, scales, code, 8, wide[:, :40]), wide[:, 40:]),
        "quantize_rows_to_fp8": (fp8.quantize_rows_to_fp8(hidden)[1],),
        "quantize_rows_to_int8": (rows_in_int8[1], int8.dequantize_rows(*rows_in_int8, torch.float32)),
        "int8_linear": (int8.int8_linear(*in_int8, torch.zeros(70, 40)),),
        "int8_linear with a low-rank part": (int8.int8_linear(*in_int8, torch.ones(70, 40), (x_a, b), adds=True),),
        "int8_linear with two": (int8.int8_linear(*in_int8, torch.zeros(70, 40), (x_a, blocks.T), spans),),
        "quick_gelu": (quick_gelu.quick_gelu(3 * hidden),),
    }
    for is_gelu in (False, True):
        room, grads = torch.zeros(6, 30), torch.zeros(6, 50)
        cases[f"activation {is_gelu}"] = (gated_mlp.gated_activation(gate_up, is_gelu, room[:, :24]), room)
        activated = gated_mlp.gated_activation_backward(gate_up, grad_activated, is_gelu, grads[:, :48])
        cases[f"activation_backward {is_gelu}"] = (activated, grads)
    return cases


def compare_kernels():
    expected = kernel_cases()
    for module in MODULES:
        module.runs_triton = lambda tensor: True
    given = kernel_cases()
    assert given.keys() == expected.keys()
    for name in given:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gpu_kernels_compute_what_plain_torch_does():
    pytest.importorskip("triton", reason="Triton comes with the CUDA build of torch")
    # Triton's interpreter runs the kernels on a CPU; it must be asked for before Triton is imported.
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", "import test_triton_kernels; test_triton_kernels.compare_kernels()"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
