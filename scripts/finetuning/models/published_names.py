"""Saved models under the names that the published files have, so that other readers find every weight.

transformers 5 saves a LLaVA under the names that it was loaded from. One made from a configuration, or trained in full
under ZeRO-3, has names of its own classes then: `vision_tower.embeddings...` where the published files say
`vision_tower.vision_model.embeddings...`. It reads both. transformers 4 and llama.cpp read the published ones only, and
put random weights in place of the others. Its tokenizers' settings have a class and a key that transformers 4 does not know;
both are written under their older names, which transformers 5 reads, too, with what the tokenizer makes: 4 would add
`token_type_ids`, which no model here takes.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.failures import writing
from finetuning.folder_lock import one_at_a_time
from finetuning.manifest import made_whole
from finetuning.run_folder import write_json

LENGTH = struct.Struct("<Q")  # of the header that a safetensors file begins with
TOWER, TEXT = "vision_tower.", "language_model."


@contextmanager
def new_model(output: Path) -> Iterator[Path]:
    """A folder to `save` a model and its processor in, which becomes `output` when the block ends.

    Raises ValueError where something is there already, or another command makes it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is there already, and is never overwritten: delete it or choose another --output")
    with (
        one_at_a_time(output, "another model"),
        writing(output, SafetensorError),
        made_whole(output, described=False) as folder,
    ):
        yield folder


def published_name(name: str) -> str:
    """What llava-hf/llava-1.5-7b-hf calls a tensor of a LLaVA that transformers calls `name`."""
    if name.startswith("lm_head."):
        return f"{TEXT}{name}"
    name = name.removeprefix("model.")
    if name.startswith(TOWER) and not name.startswith(f"{TOWER}vision_model."):
        return f"{TOWER}vision_model.{name.removeprefix(TOWER)}"
    if name.startswith(TEXT) and not name.startswith((f"{TEXT}model.", f"{TEXT}lm_head.")):
        return f"{TEXT}model.{name.removeprefix(TEXT)}"
    return name


def rename_tensors(path: Path) -> bool:
    """Give the tensors of a safetensors file their published names, whole or not at all; whether one was another."""
    with path.open("rb") as file:
        header = json.loads(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]))
        renamed = {name if name == "__metadata__" else published_name(name): value for name, value in header.items()}
        if renamed.keys() == header.keys():
            return False
        if len(renamed) != len(header):
            raise ValueError(f"{path}: two tensors would have the same published name")
        words = json.dumps(renamed, separators=(",", ":")).encode()
        words += b" " * (-len(words) % LENGTH.size)  # data begins at a multiple of 8, as the format asks
        unfinished = path.with_name(f"{path.name}.unfinished")
        with unfinished.open("wb") as output:
            output.write(LENGTH.pack(len(words)) + words)
            shutil.copyfileobj(file, output, 2**24)
            output.flush()
            os.fsync(output.fileno())
    shutil.copymode(path, unfinished)
    unfinished.replace(path)
    return True


def save(
    model: PreTrainedModel, processing_class: ProcessorMixin | PreTrainedTokenizerBase, folder: Path, **options: Any
) -> None:
    """Write a whole model and its processor to `folder` under the published names; `options` are `save_pretrained`'s."""
    model.save_pretrained(folder, **options)
    processing_class.save_pretrained(folder)
    publish(folder)


def publish(folder: Path) -> None:
    """Rename tensors and the tokenizer's settings of a saved model, in place. Nothing is done to what is named so already.

    For full weights of a LLaVA; a text model's names are the published ones. Raises ValueError where names collide.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "llava":
        for path in sorted(folder.glob("*.safetensors")):
            rename_tensors(path)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            values = json.loads(index.read_text(encoding="utf-8"))
            values["weight_map"] = {published_name(name): file for name, file in values["weight_map"].items()}
            write_json(index, values)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        values = json.loads(settings.read_text(encoding="utf-8"))
        older = dict(values)
        if values.get("tokenizer_class") == "TokenizersBackend":
            older["tokenizer_class"] = "PreTrainedTokenizerFast"
            older.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 adds token_type_ids by itself
        if values.get("tokenizer_class") == "LlamaTokenizer" and not _begins_rows(folder, values.get("bos_token")):
            older["add_bos_token"] = False  # 4 puts one before each text, whatever tokenizer.json says
        if isinstance(values.get("extra_special_tokens"), list):
            older["additional_special_tokens"] = older.pop("extra_special_tokens")
        if older != values:
            write_json(settings, older)


def _begins_rows(folder: Path, bos: object) -> bool:
    """Whether the folder's tokenizer.json puts the token that begins a text before it; without the file, it is believed to."""
    file = folder / "tokenizer.json"
    return not file.is_file() or json.dumps(bos) in json.dumps(
        json.loads(file.read_text(encoding="utf-8"))["post_processor"]
    )
