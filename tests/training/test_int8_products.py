"""Which products stay in 16 bits: the fewest whose rest keeps the loss, and those that a run was begun with."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from finetuning.data.dataset import open_dataset
from finetuning.kernels.int8_base import Int8Linear
from finetuning.models.processing import load_processing_class
from finetuning.run_folder import read_int8_products, write_int8_products
from finetuning.training.int8_products import choose_products, hold_in_int8
from support.tiny_models import DECODER, text_batch, tiny_gemma, with_lora

WIDE = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}


def adapted_gemma() -> torch.nn.Module:
    return with_lora(tiny_gemma(head_dim=128, **WIDE), DECODER).train()


def test_all_products_are_held_where_the_loss_stays():
    model = adapted_gemma()
    choice = choose_products(model, text_batch(), most=1.0)
    assert choice["in_16_bits"] == [] and "alone" not in choice
    assert 0 < choice["share_of_loss"] < 0.01 and choice["rows"] == 2


def test_the_worst_products_stay_until_the_rest_costs_little_enough():
    model, batch = adapted_gemma(), text_batch()
    before = model(**batch, use_cache=False).logits
    all_held = choose_products(model, batch, most=1.0)["share_of_loss"]
    choice = choose_products(model, batch, most=all_held / 3)
    kept, alone = choice["in_16_bits"], choice["alone"]
    assert 0 < len(kept) < 12 == len(alone)
    assert list(alone)[: len(kept)] == kept and list(alone.values()) == sorted(alone.values(), reverse=True)
    assert choice["share_of_loss"] <= all_held / 3 < all_held
    assert torch.equal(model(**batch, use_cache=False).logits, before) and model.training


def test_a_run_that_goes_on_keeps_its_choice_and_a_fresh_one_makes_its_own(tmp_path):
    choice = {"in_16_bits": ["0.down", "2.qkv"], "share_of_loss": 0.003, "rows": 8}
    write_int8_products(tmp_path, choice)
    (tmp_path / "checkpoint-5").mkdir()
    assert read_int8_products(tmp_path / "checkpoint-5") == choice and read_int8_products(Path("elsewhere")) is None
    model = adapted_gemma()
    held, cost = hold_in_int8(model, tmp_path, None, None)
    assert held == 21 - 4 and cost == "adds 0.30% of the loss on 8 rows; in 16 bits: 0.down, 2.qkv"
    assert sum(type(module) is Int8Linear for module in model.modules()) == held
    path = tmp_path / "int8_products.json"
    path.write_text(path.read_text(encoding="utf-8").replace("2.qkv", "1.qkv"), encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        read_int8_products(tmp_path)


def test_a_fresh_run_asks_its_own_rows_with_their_pictures(tiny_llava, cctv_dataset, tmp_path):
    config = AutoConfig.from_pretrained(tiny_llava)
    config.text_config.update(WIDE | {"head_dim": 32})
    model = with_lora(AutoModelForImageTextToText.from_config(config), DECODER)
    rows = open_dataset(str(cctv_dataset), vision=True)["train"]
    held, cost = hold_in_int8(model, tmp_path, rows, load_processing_class(str(tiny_llava)))
    choice = read_int8_products(tmp_path)
    assert choice["rows"] == min(8, len(rows)) and 0 < choice["share_of_loss"] < 0.005
    assert held == 7 * config.text_config.num_hidden_layers and cost.endswith(f"on {choice['rows']} rows")
