"""What llama.cpp reads of a merged model: a folder for its converter, and a LLaVA's vision tower and projector as GGUF.

The converter (llama.cpp's convert_hf_to_gguf.py) writes the language model. It needs a sentencepiece model, and learns of
tokens beyond it from `added_tokens_decoder`, which transformers 5 no longer writes: without them `<image>` and `<pad>`
would become `[PAD32000]` and `[PAD32001]`. It refuses CLIP towers, so `write_mmproj` writes them, under the names and
with the keys that llama.cpp's tools/mtmd/clip.cpp reads.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaProcessor

from finetuning.data.image_tiles import tiles_of

LARGEST_FLOAT16 = 65504.0
LINKED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json")
# Beginning of a tensor's name in clip.cpp, by its beginning in transformers. None: not used for LLaVA's features.
TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "embeddings.position_ids": None,
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": None,
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
PROJECTOR_NAMES = {"linear_1": "mm.0", "linear_2": "mm.2"}


# The folder for the converter


def stage(model: Path, folder: Path) -> None:
    """Make `folder`: links to the merged `model`'s files, and the tokenizer's files as the converter reads them.

    Raises ValueError where the vocabulary has fewer tokens than the embedding has rows and no tokenizer.model says so.
    """
    folder.mkdir(parents=True)
    for pattern in LINKED:
        for path in model.glob(pattern):
            (folder / path.name).symlink_to(path.resolve())
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if (model / "tokenizer.model").is_file():
        (folder / "tokenizer.model").symlink_to((model / "tokenizer.model").resolve())
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }
    # Spaces that the tokenizer adds are written into the template: llama.cpp would add them by a rule of its own.
    settings["add_prefix_space"] = False
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    template = template_for_llama_cpp(template, Tokenizer.from_file(str(model / "tokenizer.json")))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def sentencepiece_model(tokenizer: dict[str, Any]) -> bytes:
    """A `tokenizer.model` for a BPE with byte fallback of which only tokenizer.json (`tokenizer`) is at hand.

    Of two merges sentencepiece takes the one with the higher score, a BPE the one that it learnt first. Tokens have
    their ids in the order in which they were learnt, so minus the id is such a score: Llama's own file has it, too.
    Raises ValueError for any other kind of tokenizer.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            f"tokenizer.json: a {model.get('type')} without byte fallback, and no tokenizer.model beside it: copy "
            "tokenizer.model from the base's page into the merged folder"
        )
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    proto = sentencepiece.ModelProto()
    proto.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds = sentencepiece.ModelProto.SentencePiece
    for text, number in sorted(model["vocab"].items(), key=lambda item: item[1]):
        is_byte = len(text) == 6 and text.startswith("<0x")
        kind = kinds.BYTE if is_byte else kinds.CONTROL if text in special else kinds.NORMAL
        kind = kinds.UNKNOWN if text == (model.get("unk_token") or "<unk>") else kind
        proto.pieces.add(piece=text, score=-float(number), type=kind)
    return proto.SerializeToString()


def template_for_llama_cpp(template: str, tokenizer: Tokenizer) -> str:
    """The chat template, so that llama.cpp tokenizes what it renders as training did.

    Its server hands the template a text in which a mark (`<__media_...__>`) stands for each picture with nothing behind
    it, where this project's LLaVA template writes `<image>` and a line break. Some Llama tokenizers put a space behind
    each special token; it is written out, since llama.cpp's own is switched off in `stage`. Templates with other words
    are left as they are: the proof says what that means.
    """
    if "'<image>\\n'" not in template:
        return template
    space = " " if tokenizer.encode("<image>\n", add_special_tokens=False).tokens[1] == "▁" else ""
    return (
        template.replace(
            "{%- set text = message['content'] | trim -%}",
            f"{{%- set text = message['content'] | trim | replace('__>', '__>{space}\\n') -%}}",
        )
        .replace("{{- bos_token -}}", f"{{{{- bos_token + '{space}' -}}}}")
        .replace("text + eos_token", f"text + eos_token + '{space}'")
    )


# The vision tower and the projector


def tensors_of(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a model's safetensors files, one tensor in memory at a time."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)


def name_in_clip(name: str, num_layers: int) -> str | None:
    """What clip.cpp calls a tensor of a LLaVA; None for those of the language model and those that it does not use.

    Knows the published names, those of models made in memory (without `vision_model.`) and the classes' own (`model.`).
    `num_layers`: how many of the tower's layers are used. Raises ValueError for a name of tower or projector that is new.
    """
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "multi_modal_projector":
        names: dict[str, str | None] = dict(PROJECTOR_NAMES)
    elif part == "vision_tower":
        rest = rest.removeprefix("vision_model.")
        names = TOWER_NAMES
        if rest.startswith("encoder.layers."):
            number, _, rest = rest.removeprefix("encoder.layers.").partition(".")
            names = {
                known: f"v.blk.{number}.{ours}" if int(number) < num_layers else None
                for known, ours in LAYER_NAMES.items()
            }
    else:
        return None
    for known, ours in names.items():
        if rest == known or rest.startswith(f"{known}."):
            return None if ours is None else ours + rest.removeprefix(known)
    raise ValueError(
        f"{name}: llama.cpp has no place for this tensor of a {part}: only CLIP towers and LLaVA's projector"
    )


def layers_used(config: LlavaConfig) -> int:
    """How many of the tower's layers make the features. Raises ValueError for what llama.cpp does not compute."""
    vision, layer = config.vision_config, config.vision_feature_layer
    problems = []
    if vision.model_type != "clip_vision_model" or vision.hidden_act not in ("quick_gelu", "gelu"):
        problems.append(f"vision tower {vision.model_type} with {getattr(vision, 'hidden_act', 'no')} activation")
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer {layer}, expected one number")
    if config.vision_feature_select_strategy != "default":
        problems.append(f"vision_feature_select_strategy {config.vision_feature_select_strategy}")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        problems.append("a projector without gelu or biases")
    if problems:
        raise ValueError(f"llama.cpp cannot compute this LLaVA: {'; '.join(problems)}")
    return layer if layer >= 0 else vision.num_hidden_layers + layer + 1


def to_float16(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Matrices in fp16, vectors and positions in fp32. ValueError where a value has no place in fp16."""
    tensor = tensor.float()
    if tensor.ndim < 2 or "position" in name:
        return tensor.numpy()
    largest = tensor.abs().max().item()
    if not largest <= LARGEST_FLOAT16:
        raise ValueError(f"{name}: {largest:.3g} has no place in float16, which ends at {LARGEST_FLOAT16:.0f}")
    return tensor.half().numpy()


def write_mmproj(model: Path, config: LlavaConfig, processor: LlavaProcessor, output: Path) -> int:
    """Write the LLaVA's tower and projector to `output` as fp16 GGUF; the number of tensors.

    Raises ValueError where a tensor is missing or unknown: llama.cpp would only warn of some.
    """
    from gguf import GGUFWriter

    num_layers, vision, images = layers_used(config), config.vision_config, processor.image_processor
    if tiles_of(processor) is not None:
        raise ValueError(
            f"llama.cpp shows a picture in one view, and this model was taught image_tiles: {images.image_tiles}"
        )
    writer = GGUFWriter(output, arch="clip")
    writer.add_type("mmproj")
    writer.add_file_type(1)  # mostly fp16
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", vision.hidden_act == "gelu")
    for key, value in {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "attention.head_count": vision.num_attention_heads,
        "block_count": num_layers,
        "projection_dim": config.text_config.hidden_size,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [num_layers])
    writer.add_array("clip.vision.image_mean", list(images.image_mean))
    writer.add_array("clip.vision.image_std", list(images.image_std))
    names = set()
    for name, tensor in tensors_of(model):
        if (ours := name_in_clip(name, num_layers)) is not None:
            writer.add_tensor(ours, to_float16(ours, tensor))
            names.add(ours)
    missing = expected_tensors(num_layers) - names
    if missing:
        writer.close()
        raise ValueError(f"{model}: no tensors for {', '.join(sorted(missing)[:6])}: its files are incomplete")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(names)


def expected_tensors(num_layers: int) -> set[str]:
    """Names of all tensors of an mmproj file of a LLaVA with so many layers."""
    ends = (".weight", ".bias")
    of_layers = {f"v.blk.{n}.{name}{end}" for n in range(num_layers) for name in LAYER_NAMES.values() for end in ends}
    norms = {f"{name}{end}" for name in ("v.pre_ln", *PROJECTOR_NAMES.values()) for end in ends}
    return of_layers | norms | {"v.class_embd", "v.patch_embd.weight", "v.position_embd.weight"}
