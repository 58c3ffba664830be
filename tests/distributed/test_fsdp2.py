"""What FSDP2 wraps, and in which types it reduces; whole trainings are in test_strategies.py."""

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from finetuning.distributed.fsdp2 import keep_fp32_reductions, set_wrap_classes
from support.tiny_models import LANGUAGE_MODEL, tiny_llava, with_lora


def test_fsdp2_averages_16_bit_gradients_and_losses_in_fp32():
    # On a CPU the launches of test_strategies.py train in fp32.
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.reduce_dtype == plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    keep_fp32_reductions(plugin, quantised=False)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    keep_fp32_reductions(plugin, quantised=True)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(None, torch.float32, None)


def test_fsdp2_wraps_each_decoder_layer_and_a_frozen_tower_once():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL)
    set_wrap_classes(model)
    assert model.base_model.model._no_split_modules == ["CLIPEncoder", "LlamaDecoderLayer"]
    model = with_lora(tiny_llava(), "all-linear")
    set_wrap_classes(model)
    assert model.base_model.model._no_split_modules == ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "LlamaDecoderLayer"]
