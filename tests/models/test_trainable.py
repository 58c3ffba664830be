"""What a recipe makes trainable: part by part, counted, and refused where it cannot be had."""

import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoConfig, GemmaConfig, GemmaForCausalLM

from finetuning.arguments import ScriptArguments, parse_arguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.models.parts import count_parameters
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import describe_trainable, gets_no_gradient, set_trainable
from support.training import SAMPLE, build

# google/gemma-2b-it, config.json
GEMMA_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}


def model_args(**flags):
    argv = [
        word for key, value in flags.items() for word in (f"--{key}", *([value] if isinstance(value, str) else value))
    ]
    return parse_arguments(SAMPLE, argv)[2]


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"], None])
def test_lora_on_the_language_model_never_reaches_the_vision_tower(tiny_llava, target):
    args = model_args(**({"lora_target_modules": target} if target else {}))
    model = set_trainable(build(tiny_llava), ScriptArguments(dataset_name="x"), args)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted and all(".language_model.layers." in name and ".lora_" in name for name in adapted)
    layers = 2 * (2 if isinstance(target, list) else 7)
    assert len(adapted) == layers * 2  # A and B


def test_parts_that_no_gradient_reaches_are_left_out(tiny_llava):
    """LLaVA-1.5 reads hidden_states[-2]: of 4 CLIP layers the last one, and the final norm, see no gradient."""
    script_args = ScriptArguments(dataset_name="x", vision_tower="full", projector="full", language_model="frozen")
    model = set_trainable(build(tiny_llava), script_args, model_args())
    processor = load_processing_class(str(tiny_llava))
    row = {
        "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
        "images": [Image.new("RGB", (64, 64))],
    }
    model(**LlavaDataCollator(processor)([row])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    config = AutoConfig.from_pretrained(tiny_llava)
    assert gets_no_gradient("model.vision_tower.encoder.layers.3.mlp.fc1.weight", config)
    assert not gets_no_gradient("model.vision_tower.encoder.layers.2.mlp.fc1.weight", config)


@pytest.mark.parametrize(
    ("placement", "flags", "message"),
    [
        ({"language_model": "frozen"}, {}, "every part is frozen"),
        ({"language_model": "full", "vision_tower": "lora"}, {}, "language_model: full beside LoRA"),
        ({}, {"lora_target_modules": ["q_proj,", "v_proj"]}, r"\['q_proj,'\] match no linear layer.*without commas"),
    ],
)
def test_a_placement_that_cannot_be_had_is_refused(tiny_llava, placement, flags, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(build(tiny_llava), ScriptArguments(dataset_name="x", **placement), model_args(**flags))


@pytest.mark.slow
def test_published_parameter_counts():
    script_args, _, model_args = parse_arguments(ROOT / "scripts" / "configs" / "gemma_qlora.yaml", [])
    with torch.device("meta"):
        model = set_trainable(GemmaForCausalLM(GemmaConfig(**GEMMA_2B)), script_args, model_args)
    assert count_parameters(model) == {
        "language_model": {"trainable": 78_446_592, "lora": 78_446_592, "total": 2_584_619_008}
    }
    assert "78,446,592 of   2,584,619,008 (3.0351%)" in describe_trainable(model)
