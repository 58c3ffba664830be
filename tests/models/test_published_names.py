"""A saved LLaVA has the published names, whatever made it, and is the same model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from finetuning.models.published_names import publish, published_name, rename_tensors
from support.tiny_models import llava_batch, tiny_llava

# One of each kind in llava-hf/llava-1.5-7b-hf's model.safetensors.index.json.
PUBLISHED = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.norm.weight",
    "multi_modal_projector.linear_1.weight",
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
    "vision_tower.vision_model.pre_layrnorm.weight",
]


def names_of(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_published_names_stay_as_they_are():
    assert [published_name(name) for name in PUBLISHED] == PUBLISHED


def test_a_model_made_in_memory_gets_published_names_and_stays_the_same(tmp_path):
    model = tiny_llava().eval()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not names_of(next(tmp_path.glob("*-00001-*"))) >= set(PUBLISHED)
    modes = [path.stat().st_mode for path in sorted(tmp_path.glob("*.safetensors"))]
    publish(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and [path.stat().st_mode for path in files] == modes
    names = {name for path in files for name in names_of(path)}
    assert names >= set(PUBLISHED)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for path in files for name in names_of(path) for file in [path.name]} == index
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = llava_batch()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


def test_names_of_the_classes_are_renamed_and_data_is_untouched(tmp_path):
    model = tiny_llava()
    own = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    assert "model.language_model.norm.weight" in own and "lm_head.weight" in own
    file = tmp_path / "model.safetensors"
    save_file(own, file, {"format": "pt"})
    shutil.copyfile(file, tmp_path / "twice.safetensors")
    assert rename_tensors(file) and not rename_tensors(file)
    renamed = load_file(file)
    assert len(renamed) == len(own) and set(renamed) >= set(PUBLISHED)
    assert all(torch.equal(renamed[published_name(name)], tensor) for name, tensor in own.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_tokenizers_settings_are_those_that_transformers_4_knows(tmp_path):
    """It would take no `TokenizersBackend`, no list of extra tokens, and make token_type_ids, which `generate` refuses."""
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}', encoding="utf-8")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<image>"]}), encoding="utf-8"
    )
    publish(tmp_path)
    assert json.loads(settings.read_text(encoding="utf-8")) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<image>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }


@pytest.mark.parametrize("begins", [True, False])
def test_a_llama_tokenizer_that_puts_no_token_first_says_so(tmp_path, begins):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}} if begins else {}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"post_processor": {"special_tokens": special}}), encoding="utf-8"
    )
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}), encoding="utf-8")
    publish(tmp_path)
    assert json.loads(settings.read_text(encoding="utf-8")).get("add_bos_token", True) == begins
