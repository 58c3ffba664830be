"""4-bit weights are unpacked as bitsandbytes unpacks them."""

import pytest
import torch

from finetuning.kernels.nf4 import dequantize_4bit
from support.tiny_models import (
    relative_error,
)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_weights_are_unpacked_in_front_of_the_adapters_as_bitsandbytes_unpacks_them(quant_type):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(6, 64)
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type)
    room = torch.zeros(6, 70)
    dequantize_4bit(packed, state.absmax, state.code, state.blocksize, room[:, :64])
    assert torch.equal(room[:, :64], functional.dequantize_4bit(packed, state))
    assert room[:, 64:].eq(0).all() and relative_error(room[:, :64], weight) < 0.2
