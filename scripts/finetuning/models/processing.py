"""A model's configuration, and its processor or tokenizer with the chat template; neither weights nor the Trainer."""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from finetuning import upstream
from finetuning.data.image_tiles import parse_tiles
from finetuning.families import FAMILIES, KNOWN_TYPES, dialogue_form, family_of, is_vision, template_of
from finetuning.model_files import config_of
from finetuning.models.onevision_processor import LlavaOnevisionProcessor
from finetuning.run_folder import read_arguments

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
LLAMA3_END_OF_TURN = "<|eot_id|>"
GEMMA_TURN_MARKS = ["<start_of_turn>", "<end_of_turn>"]
# No code that comes with a model is run, and nobody is asked whether it may.
SAFE = {"trust_remote_code": False}


def load_config(name: str, revision: str = "main") -> PreTrainedConfig:
    """Config of a Hub model or a folder. Raises ValueError that says how to get what is missing."""
    if config_of(name) is not None:
        refuse_other_config(Path(name) / "config.json")
    try:
        if not Path(name).exists():
            refuse_unreachable(name, revision)
        config = AutoConfig.from_pretrained(name, revision=revision, **SAFE)
    except ValueError as error:  # transformers names a type that it does not know in twelve lines
        raise ValueError(f"{name}: transformers knows no model of this type: {KNOWN_TYPES}") from error
    except OSError as error:
        raise ValueError(
            f"{name}: neither a folder nor a model that could be reached on the Hub ({str(error).splitlines()[0]}). "
            "Check the name and the network; for a gated model accept its licence on its page and set HF_TOKEN; "
            "on a machine without network download it before and set HF_HUB_OFFLINE=1"
        ) from error
    if list(Path(name).glob("pytorch_model*.bin")) and not list(Path(name).glob("*.safetensors")):
        raise pickles_refused(name, config)
    if is_vision(config):
        try:
            family_of(config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    # The recipe and the GPU decide on the attention. transformers would load the FlashAttention that a config names
    # even where the caller gives another (LLaVA-NeXT#224).
    upstream.replace(config, "_attn_implementation", None)
    return config


def refuse_unreachable(name: str, revision: str) -> None:
    """Raise LocalEntryNotFoundError, an OSError, where neither cache nor Hub has the model: at once.

    `from_pretrained` asks six times over half a minute, with a line each.
    """
    with contextlib.suppress(HfHubHTTPError, HFValidationError):  # transformers says what is wrong
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            snapshot_download(name, revision=revision, allow_patterns=["config.json"])


def refuse_other_config(path: Path) -> None:
    """Raises ValueError, one sentence with the remedy, where a folder's config.json is of no model that loads here."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download the model again") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"{path} names no model_type, so it is no model's: {KNOWN_TYPES}")
    if "mm_vision_tower" in settings:
        raise ValueError(
            f"{path}: this is a checkpoint of LLaVA's original authors, which transformers does not load: use the same "
            "model as llava-hf publishes it (hf download llava-hf/llava-1.5-7b-hf)"
        )


def template_path(config: PreTrainedConfig, given: str | None) -> Path | None:
    """The template file that a model is trained and asked with: the given one, else the project's; None: its own.

    Raises ValueError, as `dialogue_form` does, for a language model whose dialogues are not known here.
    """
    if given is not None:
        return Path(given)
    if config.model_type not in FAMILIES:
        return None
    return CHAT_TEMPLATES / template_of(config)


def processing_class_of(*settings: Any) -> ProcessorMixin | PreTrainedTokenizerBase:
    """`load_processing_class` for a recipe: its three groups of arguments, or one namespace of its flags."""
    recipe = {name: value for group in settings for name, value in vars(group).items()}
    names = ("image_aspect_ratio", "image_max_tiles", "image_tiles", "chat_template_path")
    given = {name: recipe[name] for name in names}
    return load_processing_class(recipe["model_name_or_path"], revision=recipe["model_revision"], **given)


def load_processing_class(
    name: str,
    *,
    image_aspect_ratio: str = "pad",
    image_max_tiles: int | None = None,
    image_tiles: str | None = None,
    chat_template_path: str | None = None,
    revision: str = "main",
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Processor (of a vision model) or tokenizer, with the chat template that training and inference share.

    The project's template of the model's type is set, or the file `chat_template_path`. With
    `image_aspect_ratio="pad"` pictures are made square by padding (`do_pad` of transformers' LlavaImageProcessor)
    before they are resized; with "crop" the published processor cuts out their centre. `image_max_tiles` keeps the grids of
    so many tiles at most; `follow_tiles` tells the model. `image_tiles` ("3x2") shows each picture and its tiles as several
    (`data.image_tiles`). Raises ValueError for settings that the family does not have.
    """
    config = load_config(name, revision)
    if chat_template_path is None:
        family_of(config)
    if is_vision(config) and image_aspect_ratio == "crop" and not family_of(config).can_crop:
        raise ValueError(
            f"image_aspect_ratio: crop does nothing to {config.model_type}, which shows whole pictures: remove it"
        )
    try:
        processor_class = LlavaOnevisionProcessor if config.model_type == "llava_onevision" else AutoProcessor
        processing_class = (processor_class if is_vision(config) else AutoTokenizer).from_pretrained(
            name, revision=revision, **SAFE
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: its {'processor' if is_vision(config) else 'tokenizer'} does not load "
            f"({str(error).splitlines()[0]}): download the model with all its small files"
        ) from error
    if image_max_tiles is not None:
        keep_small_grids(processing_class, config, image_max_tiles)
    show_tiles(processing_class, config, image_tiles)
    if is_vision(config) and image_aspect_ratio == "pad" and family_of(config).can_crop:
        settings = processing_class.image_processor.to_dict() | {"do_pad": True}
        settings.pop("image_processor_type")
        processing_class.image_processor = LlavaImageProcessor(**settings)
    if is_vision(config) and chat_template_path is None and dialogue_form(config) == "llama3":
        processing_class.tokenizer.eos_token = LLAMA3_END_OF_TURN  # as below
    chat_template_path = template_path(config, chat_template_path)
    if config.model_type.startswith("gemma"):
        # Every Gemma vocabulary has them. If the tokenizer's settings do not list them as special (google/gemma-2b),
        # transformers 5 splits them into letters.
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        tokenizer.add_tokens(GEMMA_TURN_MARKS, special_tokens=True)
        # The end of an answer, for servers that read it from the tokenizer. <eos> would be the end of a document.
        tokenizer.eos_token = GEMMA_TURN_MARKS[1]
    if chat_template_path is not None:
        processing_class.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    return processing_class


def keep_small_grids(processor: ProcessorMixin, config: PreTrainedConfig, most: int) -> None:
    """Leave the processor the grids of at most `most` tiles. Raises ValueError where there are none, or the model has no tiles."""
    grids = getattr(config, "image_grid_pinpoints", None)
    if not grids:
        raise ValueError(f"image_max_tiles: {most}, but {config.model_type} sees a picture in one view: remove it")
    side = config.vision_config.image_size
    tiles = {tuple(grid): grid[0] * grid[1] // side**2 for grid in grids}
    kept = [list(grid) for grid, number in tiles.items() if number <= most]
    if not kept:
        raise ValueError(
            f"image_max_tiles: {most}, but the smallest grid of {config.model_type} has {min(tiles.values())} tiles"
        )
    processor.image_processor.image_grid_pinpoints = kept


def show_tiles(processor: Any, config: PreTrainedConfig, tiles: str | None) -> None:
    """Let the processor show `image_tiles`; it is kept with its picture settings. Raises ValueError where the model cannot."""
    if parse_tiles(tiles) is None:
        return
    if not is_vision(config) or not family_of(config).can_crop:
        own = "has tiles of its own or averages its views" if is_vision(config) else "reads text only"
        raise ValueError(f"image_tiles: {tiles}, but {config.model_type} {own}: remove it")
    processor.image_processor.image_tiles = tiles


def follow_tiles(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Let the model cut pictures as the processor does, which a run keeps; nothing without tiles."""
    grids = getattr(getattr(processor, "image_processor", None), "image_grid_pinpoints", None)
    if grids and getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = grids


def processing_class_for_inference(name: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor or tokenizer of a base model, a run's folder or a merged folder, with the template it is asked by."""
    folder = Path(name)
    keeps_own_template = read_arguments(folder) is not None or (folder / "merge_report.json").is_file()
    return load_saved_processing_class(folder) if keeps_own_template else load_processing_class(name)


def load_saved_processing_class(folder: Path) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor or tokenizer that training saved beside the weights, with its template and picture settings."""
    settings = folder / "processor_config.json"
    if not settings.is_file():
        return AutoTokenizer.from_pretrained(folder, **SAFE)
    kind = json.loads(settings.read_text(encoding="utf-8")).get("processor_class")
    processor_class = LlavaOnevisionProcessor if kind == LlavaOnevisionProcessor.__name__ else AutoProcessor
    return processor_class.from_pretrained(folder, **SAFE)


def pickles_refused(name: str, config: PreTrainedConfig) -> ValueError:
    """The error for weights that can run code when they are opened, with the command that converts them."""
    model_class = "AutoModelForImageTextToText" if is_vision(config) else "AutoModelForCausalLM"
    is_folder = Path(name).is_dir()
    folder = name if is_folder else f"models/{name.rpartition('/')[2]}"
    afterwards = "" if is_folder else f", copy the tokenizer's files there too, and set --model_name_or_path {folder}"
    return ValueError(
        f"{name}: its weights are pickles, which can run code when they are opened, and only safetensors are read here. "
        f'Convert them once (transformers reads the tensors only): python -c "from transformers import {model_class} as M; '
        f"M.from_pretrained('{name}', use_safetensors=False).save_pretrained('{folder}')\"{afterwards}"
    )
