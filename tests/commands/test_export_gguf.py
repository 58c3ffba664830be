"""What llama.cpp is given is the merged model, token for token and weight for weight; what it cannot compute is refused.

That llama.cpp itself answers so is proven by each export: it takes a build of llama.cpp, which no test makes.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_gguf import check_inputs
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor

from finetuning.export.gguf_export import check_proof, divergence
from finetuning.export.gguf_files import layers_used, name_in_clip, stage, write_mmproj
from finetuning.export.llama_cpp import CLASS_FIRST, CLASS_LAST, LLAVA_GRAPH, as_messages, find_llama_cpp
from finetuning.export.merging import without_training_marks

TEXTS = ["USER: ", "\nHow many people are in view? ASSISTANT:", " 사람이 몇 명 있나요? 12명", "naïve 🙂 CCTV\n"]


@pytest.fixture(scope="module")
def merged(tiny_llava, tmp_path_factory) -> Path:
    """A folder as merge_adapter.py leaves it."""
    folder = shutil.copytree(tiny_llava, tmp_path_factory.mktemp("models") / "merged")
    template = folder / "chat_template.jinja"
    template.write_text(without_training_marks(template.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "merge_report.json").write_text("{}")
    return folder


def test_the_converter_sees_every_token_as_the_model_does(merged, tmp_path):
    stage(merged, tmp_path / "staged")
    tokenizer = Tokenizer.from_file(str(merged / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "staged" / "tokenizer.model"))
    assert pieces.vocab_size() == tokenizer.get_vocab_size(with_added_tokens=False)
    start = len(tokenizer.encode("<image>", add_special_tokens=False).ids)
    for text in TEXTS:
        expected = tokenizer.encode(f"<image>{text}", add_special_tokens=False).ids[start:]
        assert pieces.encode(text) == expected
    settings = json.loads((tmp_path / "staged" / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["content"]: int(number) for number, token in settings["added_tokens_decoder"].items()}
    assert added["<image>"] == tokenizer.token_to_id("<image>") and added["<pad>"] == tokenizer.token_to_id("<pad>")
    assert settings["add_prefix_space"] is False


def rendered(folder: Path, content: str) -> str:
    from jinja2 import Environment

    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (folder / "chat_template.jinja").read_text(encoding="utf-8")
    )
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "3."}]
    messages.append({"role": "user", "content": "Sure?"})
    return template.render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


def test_the_template_makes_llama_cpps_mark_a_picture_of_training(merged, tmp_path):
    stage(merged, tmp_path / "staged")
    text = rendered(tmp_path / "staged", "<__media_a1B2__>How many?")
    assert text == "<s>USER: <__media_a1B2__>\nHow many? ASSISTANT: 3.</s>USER: Sure? ASSISTANT:"


def test_real_tokens_keep_their_names_and_spaces(merged, real_llava_processor, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "real")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(real_llava_processor / name, folder / name)
    stage(folder, tmp_path / "staged")
    settings = json.loads((tmp_path / "staged" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["added_tokens_decoder"]["32000"]["content"] == "<image>"
    assert settings["added_tokens_decoder"]["32001"]["content"] == "<pad>"
    # The real tokenizer puts a space behind each special token; llama.cpp is given it in the text.
    text = rendered(tmp_path / "staged", "<__media_a1B2__>How many?")
    assert text == "<s> USER: <__media_a1B2__> \nHow many? ASSISTANT: 3.</s> USER: Sure? ASSISTANT:"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"), add_bos=False)
    trained = tokenizer.encode("<s>USER: <image>\nHow many? ASSISTANT:", add_special_tokens=False)
    place = trained.tokens.index("<image>")
    ours = [pieces.encode(part) for part in ("USER: ", "\nHow many? ASSISTANT:")]  # it adds the space itself
    assert trained.ids[1:place] == ours[0] and trained.ids[place + 1 :] == ours[1]


def test_mmproj_holds_the_tower_and_the_projector(merged, tmp_path):
    config, processor = AutoConfig.from_pretrained(merged), AutoProcessor.from_pretrained(merged)
    number = write_mmproj(merged, config, processor, tmp_path / "mmproj.gguf")
    read = GGUFReader(tmp_path / "mmproj.gguf")
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    weights = load_file(merged / "model.safetensors")
    kept = {name: ours for name in weights if (ours := name_in_clip(name, layers_used(config)))}
    assert len(tensors) == len(kept) == number and layers_used(config) == config.vision_config.num_hidden_layers - 1
    for name, ours in kept.items():
        expected = weights[name].numpy()
        exact = expected.ndim < 2 or "position" in name
        np.testing.assert_array_equal(tensors[ours], expected if exact else expected.astype(np.float16))
    assert read.fields["clip.vision.block_count"].contents() == 3
    assert read.fields["clip.vision.image_mean"].contents() == pytest.approx(processor.image_processor.image_mean)
    assert read.fields["clip.use_gelu"].contents() is False


@pytest.mark.parametrize("start", ["", "model."])
def test_every_way_to_name_a_tower_is_read_and_nothing_is_left_out_silently(merged, tmp_path, start):
    config, processor = AutoConfig.from_pretrained(merged), AutoProcessor.from_pretrained(merged)
    weights = load_file(merged / "model.safetensors")
    renamed = {start + name.replace("vision_tower.vision_model.", "vision_tower."): t for name, t in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    write_mmproj(tmp_path, config, processor, tmp_path / "a.gguf")
    lacking = next(name for name in renamed if name.endswith("layers.1.mlp.fc2.bias") and "vision" in name)
    save_file({name: t for name, t in renamed.items() if name != lacking}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensors for v\.blk\.1\.ffn_down\.bias"):
        write_mmproj(tmp_path, config, processor, tmp_path / "b.gguf")
    save_file(renamed | {f"{start}vision_tower.new_part.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"vision_tower\.new_part\.weight: llama\.cpp has no place"):
        write_mmproj(tmp_path, config, processor, tmp_path / "c.gguf")
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="cannot compute this LLaVA: vision_feature_select_strategy full"):
        layers_used(config)


def test_divergence_is_kl_where_all_tokens_are_given():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 30, dtype=torch.float64).log_softmax(-1)
    exact = (ours.exp() * (ours - theirs)).sum().item()
    given = dict(enumerate(theirs.tolist()))
    assert divergence(ours, given) == pytest.approx(exact, abs=1e-9)
    best = dict(sorted(given.items(), key=lambda item: -item[1])[:5])
    assert 0 < divergence(ours, best) <= exact
    sure = torch.tensor([0.0, -90.0], dtype=torch.float64)
    assert divergence(sure, {0: 0.0, 1: -3.4e38}) == pytest.approx(0, abs=1e-9)  # what a server says of 0
    assert divergence(ours, dict(enumerate(ours.tolist()))) == pytest.approx(0, abs=1e-12)


def test_pictures_stand_in_the_turns_that_show_them():
    from support.answering import picture

    user = {"role": "user", "content": "How many?"}
    plain = as_messages({"messages": [user], "images": [picture(0)]})
    assert [part["type"] for part in plain[0]["content"]] == ["image_url", "text"]
    later = [user, {"role": "assistant", "content": "3."}, {"role": "user", "content": "<image>\nAnd here?"}]
    marked = as_messages({"messages": later, "images": [picture(1)]})
    assert marked[0]["content"] == "How many?" and marked[2]["content"][1]["text"] == "And here?"


def test_what_cannot_be_exported_is_said(merged, tmp_path):
    with pytest.raises(ValueError, match=r"--llama_cpp .*: no .*convert_hf_to_gguf\.py.* build it"):
        find_llama_cpp(tmp_path, vision=True)
    for name in ("convert_hf_to_gguf.py", "build/bin/llama-quantize", "build/bin/llama-server", LLAVA_GRAPH):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"inp = {CLASS_LAST};")
    with pytest.raises(ValueError, match=r"shifted patches \(ggml-org/llama.cpp#25814\)\. Mend the line"):
        find_llama_cpp(tmp_path, vision=True)
    assert find_llama_cpp(tmp_path, vision=False).server.is_file()
    (tmp_path / LLAVA_GRAPH).write_text(f"inp = {CLASS_FIRST};")
    find_llama_cpp(tmp_path, vision=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an adapter: merge it first.*; --output .* exists"):
        check_inputs(Namespace(model=tmp_path, output=tmp_path))
    assert check_inputs(Namespace(model=merged, output=tmp_path / "new"))


def test_other_answers_than_the_merged_models_are_not_proven():
    found = {"equal_answers": 47, "questions": 50, "mean_kl": 6e-3, "equal_prompt_lengths": 50}
    with pytest.raises(ValueError, match="not proven: 47 of 50 answers of the f16 file"):
        check_proof({"files": {"f16": found}})
    check_proof({"files": {"f16": found | {"equal_answers": 48}}})
