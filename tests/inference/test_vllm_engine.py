"""What vLLM is given, and what it is refused. Its answers need vLLM, which is not among the requirements."""

import importlib.util

import pytest
import torch

from finetuning.data.collator import prompt_batch
from finetuning.inference.vllm_engine import as_seen, reason_against_vllm, vllm_prompt
from finetuning.models.processing import load_processing_class
from support.answering import LINEAR, load, picture, vision_rows


@pytest.fixture
def with_vllm(monkeypatch):
    """An environment where vLLM is found."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "vllm" else find(name))


def test_without_vllm_it_is_refused_with_where_to_get_it(tiny_gemma):
    assert importlib.util.find_spec("vllm") is None
    assert "an environment of its own (docs/serving.md)" in reason_against_vllm(str(tiny_gemma))


def test_whole_models_and_adapters_of_the_language_model_are_taken_others_are_to_be_merged(
    tiny_llava, with_vllm, tmp_path
):
    assert reason_against_vllm(str(tiny_llava)) is None
    for name, targets in (("language", LINEAR), ("projector", f"{LINEAR}|.*multi_modal_projector.linear_1")):
        model, _ = load(tiny_llava, adapter=True, targets=targets)
        model.peft_config["default"].base_model_name_or_path = str(tiny_llava)
        model.save_pretrained(tmp_path / name)
    assert reason_against_vllm(str(tmp_path / "language")) is None
    reason = reason_against_vllm(str(tmp_path / "projector"))
    assert "trains projector, which vLLM's LoRA leaves out" in reason and "merge_adapter.py --run" in reason


def test_a_prompt_is_this_projects_with_one_image_token_a_picture(tiny_llava):
    processor = load_processing_class(str(tiny_llava))
    a_picture = 64  # (64 / 8)^2
    for row in vision_rows():
        tokens = prompt_batch(processor, [row])["input_ids"][0].tolist()
        prompt = vllm_prompt(processor, row, tokens)
        repeated = [
            part
            for token in prompt["prompt_token_ids"]
            for part in [token] * (a_picture if token == processor.image_token_id else 1)
        ]
        assert tokens.count(processor.image_token_id) == a_picture * len(row["images"])
        assert repeated == tokens
        assert len(prompt.get("multi_modal_data", {"image": []})["image"]) == len(row["images"])


def test_a_picture_that_is_handed_over_has_the_pixels_of_training(tiny_llava):
    """Padded first, it is the same to a processor that pads and to the published one, which crops."""
    pads, crops = (load_processing_class(str(tiny_llava)) for _ in range(2))
    crops.image_processor.do_pad = False
    wide = picture(0)
    expected = pads.image_processor(wide, return_tensors="pt")["pixel_values"]
    for processor in (pads, crops):
        given = processor.image_processor(as_seen(pads, wide), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(given, expected)
    assert as_seen(crops, wide) is wide
