"""INT8 products: what the rotation is for, how far they are from exact ones, and what their low-rank part adds."""

import pytest
import torch

from finetuning.kernels.fp8 import quantize_rows_to_fp8
from finetuning.kernels.int8 import dequantize_rows, hadamard, int8_linear, quantize_rows_to_int8
from support.tiny_models import relative_error


def operands(width: int = 256, outlier: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (50, width), one channel of which is `outlier` times as large as the others, and W (40, width)."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, width), torch.randn(40, width)
    x[:, 5] *= outlier
    return x, weight


def test_the_rotation_is_orthogonal_and_quantised_rows_are_what_they_were():
    matrix = hadamard(torch.float32, torch.device("cpu"))
    assert torch.equal(matrix @ matrix, 128 * torch.eye(128))
    x, _ = operands(outlier=100.0)
    values, scale = quantize_rows_to_int8(x)
    assert values.dtype == torch.int8 and values.abs().amax(1).eq(127).all()
    back = dequantize_rows(values, scale, torch.float32)
    # Half a step of the row's scale at most in each of 128 numbers that are added.
    assert ((back - x).norm(dim=1) <= scale * 0.5 * 128**0.5 * 256**0.5).all()
    assert relative_error(back, x) < 0.012


def test_rows_of_zeros_and_rows_that_are_tiny():
    x = torch.zeros(3, 128)
    x[1], x[2] = 1e-20, torch.arange(128) * 1e-9
    values, scale = quantize_rows_to_int8(x)
    assert torch.isfinite(scale).all() and values[0].eq(0).all()
    assert relative_error(dequantize_rows(values, scale, torch.float32)[2], x[2]) < 0.02


@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_products_are_nearer_to_exact_ones_than_fp8_is(outlier):
    x, weight = operands(1024, outlier)
    exact = x @ weight.T
    given = int8_linear(quantize_rows_to_int8(x), quantize_rows_to_int8(weight), torch.empty(50, 40))
    in_fp8 = [values.float() * scale for values, scale in map(quantize_rows_to_fp8, (x, weight))]
    assert relative_error(given, exact) < 0.015
    assert relative_error(in_fp8[0] @ in_fp8[1].T, exact) > 1.8 * relative_error(given, exact)


def test_the_sum_with_the_low_rank_part_is_rounded_once():
    x, weight = operands()
    x_a, b = 1e-3 * torch.randn(50, 8).bfloat16(), torch.randn(8, 40).bfloat16()
    quantised = quantize_rows_to_int8(x), quantize_rows_to_int8(weight)
    base = int8_linear(*quantised, torch.empty(50, 40))
    out = torch.empty(50, 40, dtype=torch.bfloat16)
    low_rank = x_a.float() @ b.float()
    assert int8_linear(*quantised, out, (x_a, b)) is out
    assert torch.equal(out, (base + low_rank).bfloat16())
    rounded_twice = base.bfloat16() + low_rank.bfloat16()
    assert relative_error(out.float() - base, low_rank) < relative_error(rounded_twice.float() - base, low_rank)
    before = torch.randn(50, 40).bfloat16()
    assert torch.equal(int8_linear(*quantised, before.clone(), adds=True), (base + before).bfloat16())
