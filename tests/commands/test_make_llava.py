"""A language model and a tower become one LLaVA with their own weights, whose projector is trained first."""

import pytest
import torch
from conftest import must_run, run_here
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
)

from finetuning.models.processing import load_processing_class
from support.training import train


@pytest.fixture(scope="module")
def parts(tiny_llava, tmp_path_factory):
    """Folders of the language model and of the tower of a tiny LLaVA, each as a model of its own."""
    folder = tmp_path_factory.mktemp("parts")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    text = AutoModelForCausalLM.from_config(model.config.text_config)
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.save_pretrained(folder / "text")
    load_processing_class(str(tiny_llava)).tokenizer.save_pretrained(folder / "text")
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "tower")
    size = model.config.vision_config.image_size
    LlavaImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "tower"
    )
    return folder


def test_both_keep_their_weights_and_stage_one_moves_the_projector_alone(parts, cctv_dataset, tmp_path):
    made = tmp_path / "made"
    words = ("--language_model", parts / "text", "--vision_tower", parts / "tower", "--output", made)
    assert "train its projector first" in must_run("scripts/make_llava.py", *words)
    text, llava = (
        AutoModelForCausalLM.from_pretrained(parts / "text"),
        LlavaForConditionalGeneration.from_pretrained(made),
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, found = text(ids).logits, llava(ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-6)
    assert found.shape[-1] % 64 == 0
    before = load_file(made / "model.safetensors")
    run = train(
        *(made, cctv_dataset, tmp_path / "stage1", "--language_model", "frozen", "--projector", "full"),
        *("--vision_tower", "frozen", "--eval_answers", "0"),
    )
    after = load_file(run / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}
    train(
        run, cctv_dataset, tmp_path / "stage2", "--projector", "full", "--vision_tower", "frozen", "--eval_answers", "0"
    )
    assert (tmp_path / "stage2" / "adapter_model.safetensors").is_file()


def test_parts_that_cannot_be_joined_are_named_together(tiny_gemma, parts, tmp_path):
    words = ("--language_model", tiny_gemma, "--vision_tower", parts / "text", "--output", tmp_path / "made")
    result = run_here("scripts/make_llava.py", *words)
    assert result.returncode == 1
    assert "is of type gemma, expected llama or mistral; --vision_tower" in result.stderr
    assert "is of type llama, expected clip" in result.stderr and not (tmp_path / "made").exists()
