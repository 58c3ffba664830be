"""Models as they are loaded: precision of a Gemma in fp16, and folders that are none."""

import json
import shlex
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import GemmaForCausalLM
from trl import ModelConfig

from finetuning.models.loading import base_model_without_weights, load_base_model, load_for_inference
from finetuning.models.processing import load_config, load_processing_class


def test_fp16_keeps_the_sums_that_overflow_in_fp32(tiny_gemma):
    """The residual stream of real Gemmas exceeds fp16's 65,504; here the embedding is scaled up until it does."""
    ids = torch.tensor([[2, 9, 300, 301, 302, 400]])
    models = {dtype: load_base_model(str(tiny_gemma), dtype=dtype) for dtype in (torch.float32, torch.float16)}
    plain = GemmaForCausalLM.from_pretrained(tiny_gemma, dtype=torch.float16)
    for model in (*models.values(), plain):
        embedding = model.get_input_embeddings()
        # Only what enters the stream; the output layer shares these weights. Times Gemma's own sqrt(128), it is 113,000.
        scale = 10_000 / embedding.weight.abs().max().item()
        embedding.register_forward_hook(lambda module, inputs, output, scale=scale: output * scale)
    with torch.no_grad():
        assert not torch.isfinite(plain(input_ids=ids).logits).all()
        expected, logits = (model(input_ids=ids).logits for model in models.values())
    assert logits.dtype == torch.float16
    assert torch.allclose(logits.float(), expected, atol=2e-3 * expected.abs().max().item())


@pytest.mark.slow
def test_a_process_that_is_sent_its_weights_has_room_for_none_and_all_else(tiny_llava):
    model_args = ModelConfig(model_name_or_path=str(tiny_llava), attn_implementation="sdpa")
    empty = base_model_without_weights(model_args, torch.bfloat16)
    loaded = load_base_model(str(tiny_llava), dtype=torch.bfloat16, attn_implementation="sdpa")
    parameters = [
        [(name, weight.shape, weight.dtype) for name, weight in m.named_parameters()] for m in (empty, loaded)
    ]
    assert parameters[0] == parameters[1]
    assert dict(empty.named_buffers()).keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(empty.get_buffer(name), buffer), name
    assert empty.generation_config == loaded.generation_config and empty.config.to_dict() == loaded.config.to_dict()


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
        ): "transformers knows no model of this type.*trains llava, vipllava",
        folder("other", '{"model_type": "qwen2_vl"}'): "other: models of type qwen2_vl are not known here.*The nearest",
        folder(
            "text", '{"model_type": "qwen2"}'
        ): "qwen2 are not known here.*nearest to it is gemma.*--chat_template_path",
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


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tiny_gemma, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_gemma, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights are pickles") as refused:
        load_base_model(str(folder), dtype=torch.float32)
    command = shlex.split(str(refused.value).partition("tensors only): ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})  # what the user is told to run
    assert load_base_model(str(folder), dtype=torch.float32).num_parameters() > 0


def test_code_that_comes_with_a_model_is_never_run(tiny_gemma, tmp_path):
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_gemma, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="with-code: "):
        load_config(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tiny_llava", "tiny_gemma"])
def test_a_tiny_model_in_4_bits_computes_with_the_weights_that_it_was_trained_with(request, name):
    """bitsandbytes 0.50 unpacks rows whose width is no multiple of 64 wrongly on CPUs with AVX-512."""
    folder = request.getfixturevalue(name)
    model, _ = load_for_inference(str(folder), load_in_4bit=True)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) >= 14
    assert all(layer.in_features % 64 == 0 for layer in layers.values())
    ids = torch.tensor([[2, 9, 300, 301, 302, 400]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        for key, layer in layers.items():
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = weight
            if layer.bias is not None:
                plain.bias.data = layer.bias.data
            parent, _, child = key.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
