"""Models as they are loaded: precision of a Gemma in fp16, and folders that are none."""

import pytest
import torch
from transformers import GemmaForCausalLM

from finetuning.models.loading import load_base_model, load_processing_class


def test_fp16_keeps_the_sums_that_overflow_in_fp32(tiny_gemma):
    """The residual stream of real Gemmas exceeds fp16's 65,504; here the embedding is scaled up until it does."""
    ids = torch.tensor([[2, 9, 300, 301, 302, 400]])
    models = {dtype: load_base_model(str(tiny_gemma), dtype=dtype) for dtype in (torch.float32, torch.float16)}
    plain = GemmaForCausalLM.from_pretrained(tiny_gemma, dtype=torch.float16)
    for model in (*models.values(), plain):
        embedding = model.get_input_embeddings()
        # Only what enters the stream; the output layer shares these weights. Times Gemma's own sqrt(96), it is 98,000.
        scale = 10_000 / embedding.weight.abs().max().item()
        embedding.register_forward_hook(lambda module, inputs, output, scale=scale: output * scale)
    with torch.no_grad():
        assert not torch.isfinite(plain(input_ids=ids).logits).all()
        expected, logits = (model(input_ids=ids).logits for model in models.values())
    assert logits.dtype == torch.float16
    assert torch.allclose(logits.float(), expected, atol=2e-3 * expected.abs().max().item())


def test_folders_that_are_no_model_of_this_project_are_named(tmp_path, tiny_llava):
    def folder(name: str, config: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return str(tmp_path / name)

    original = "checkpoint of LLaVA's original authors.*hf download llava-hf/llava-1.5-7b-hf"
    cases = {
        folder("new", '{"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}'): original,
        folder("old", '{"model_type": "llava", "architectures": [], "mm_vision_tower": "openai/clip"}'): original,
        folder(
            "unknown", '{"model_type": "no_such_type"}'
        ): "transformers knows no model of this type.*trains llava, gemma",
        folder(
            "other", '{"model_type": "gemma3"}'
        ): "model_type is gemma3, for which this project has no chat template",
        folder("none", "{}"): "names no model_type",
        folder("list", "[]"): "names no model_type",
        folder("broken", "{"): "config.json is not JSON.*download the model again",
    }
    for name, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            load_processing_class(name)
        assert "\n" not in str(caught.value)
    bare = folder("bare", (tiny_llava / "config.json").read_text())
    with pytest.raises(ValueError, match=r"its processor does not load.*download the model with all its small files"):
        load_processing_class(bare)
    with pytest.raises(ValueError, match=r"its weights do not load.*\*\.safetensors files"):
        load_base_model(bare, dtype=torch.float32)
