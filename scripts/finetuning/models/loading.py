"""Loading of models and their processors: for training, for inference, as a base alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_NAME
from trl import ModelConfig

from finetuning import upstream
from finetuning.arguments import TrainingArguments
from finetuning.device import inference_dtype, weight_dtype
from finetuning.families import FAMILIES, KNOWN_TYPES, dialogue_form, family_of, is_vision, template_of
from finetuning.model_files import config_of
from finetuning.models.onevision_processor import LlavaOnevisionProcessor
from finetuning.models.parts import base_model_of
from finetuning.run_folder import ADAPTER_WEIGHTS, adapter_base, read_arguments
from finetuning.strategy import Strategy

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
LLAMA3_END_OF_TURN = "<|eot_id|>"
GEMMA_TURN_MARKS = ["<start_of_turn>", "<end_of_turn>"]
QUANTISATION_KEYS = [
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
]
# No code that comes with a model is run, and nobody is asked whether it may.
SAFE = {"trust_remote_code": False}
# These stay in 16 bits when the base is quantised: the vision tower and projector are 5 % of LLaVA's weights, and TRL's
# fused loss reads the rows of `lm_head` directly. transformers matches the patterns from the start of a module's name.
NOT_QUANTISED = [".*vision_tower", ".*multi_modal_projector", "lm_head"]


def load_config(name: str, revision: str = "main") -> PreTrainedConfig:
    """Config of a Hub model or a folder. Raises ValueError that says how to get what is missing."""
    if config_of(name) is not None:
        refuse_other_config(Path(name) / "config.json")
    try:
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


def load_processing_class(
    name: str,
    *,
    image_aspect_ratio: str = "pad",
    image_max_tiles: int | None = None,
    chat_template_path: str | None = None,
    revision: str = "main",
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Processor (of a vision model) or tokenizer, with the chat template that training and inference share.

    The project's template of the model's type is set, or the file `chat_template_path`. With
    `image_aspect_ratio="pad"` pictures are made square by padding (`do_pad` of transformers' LlavaImageProcessor)
    before they are resized; with "crop" the published processor cuts out their centre. `image_max_tiles` keeps the grids of
    so many tiles at most; `follow_tiles` tells the model. Raises ValueError for settings that the family does not have.
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


def follow_tiles(config: PreTrainedConfig, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """Let the model cut pictures as the processor does, which a run keeps; nothing without tiles."""
    grids = getattr(getattr(processor, "image_processor", None), "image_grid_pinpoints", None)
    if grids and getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = grids


def quantization_config(model_args: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """TRL's flags (`load_in_4bit`, `bnb_4bit_quant_type`, `use_bnb_nested_quant`) -> bitsandbytes' config, or None."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        llm_int8_skip_modules=NOT_QUANTISED,
    )


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


def load_base_model(
    name: str,
    *,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    attn_implementation: str | None = None,
    device_map: dict[str, int | str] | None = None,
    revision: str = "main",
) -> PreTrainedModel:
    """Load the model class that the config of `name` asks for. A Gemma in fp16 keeps its residual stream in fp32.

    Raises ValueError, as `load_config` does, if there is no such model, and if its weights are missing.
    """
    config = load_config(name, revision)
    model_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    try:
        model = model_class.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=attn_implementation,
            device_map=device_map,
            revision=revision,
            use_safetensors=True,
            **SAFE,
        )
    except OSError as error:
        if f"have a file named {SAFE_WEIGHTS_NAME}" in str(error) and not Path(name).is_dir():
            raise pickles_refused(name, config) from error
        raise ValueError(
            f"{name}: its weights do not load ({str(error).splitlines()[0]}): download the model again, with its "
            "*.safetensors files"
        ) from error
    if is_deepspeed_zero3_enabled():
        # Under ZeRO-3 transformers 5.23 stores every renaming that it knows, not those that this checkpoint needed, and
        # would save weights under names that no class has. Without them it saves the class's own names.
        upstream.check_read("transformers.core_model_loading", "_weight_conversions")
        model._weight_conversions = None
    if quantization is not None and quantization.load_in_4bit:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # On a CPU with AVX-512 BF16 bitsandbytes would repack 4-bit weights at the first answer. Then no
                # gradient passes through them, scales are rounded to bf16, and rows without whole blocks are an error.
                upstream.replace(module, "support_avx512bf16_for_cpu", False)
    if dtype == torch.float16 and config.model_type.startswith("gemma"):
        keep_residual_stream_in_fp32(model)
    return model


def keep_residual_stream_in_fp32(model: PreTrainedModel) -> None:
    """Keep a Gemma's residual stream in fp32 and all products in fp16, in place: for GPUs without bf16 (T4).

    The residual stream of Gemma-3-270M reaches 103,821 on an ordinary question, fp16 ends at 65,504, and the loss
    becomes NaN (google/gemma_pytorch#24). Outputs of the linear layers stay below. So the embedding returns fp32, which
    all sums inherit; norms and rotary embedding return fp16 to the linear layers and the attention.
    """

    def to_fp16(module: nn.Module, inputs: tuple, output: torch.Tensor | tuple[torch.Tensor, ...]):
        return output.half() if torch.is_tensor(output) else tuple(part.half() for part in output)

    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.register_forward_hook(to_fp16)


def load_base_for_training(
    model_args: ModelConfig, training_args: TrainingArguments, *, trains_base_weights: bool
) -> PreTrainedModel:
    """The base model of a recipe: quantised or not, in the run's precision.

    Frozen weights have the 16-bit dtype of the run. `trains_base_weights` (a part is trained in full and none has LoRA)
    loads all in fp32, because 16-bit weights lose small updates; DeepSpeed holds fp32 masters itself. The recipe's
    `dtype` overrides both. Raises ValueError if quantised weights would be trained in full.
    """
    dtype = weight_dtype(training_args.fp16, training_args.bf16)
    if model_args.dtype != "auto":
        dtype = getattr(torch, model_args.dtype)
    elif trains_base_weights and not Strategy.from_environment().is_deepspeed:
        dtype = torch.float32
    quantization = quantization_config(model_args, weight_dtype(training_args.fp16, training_args.bf16))
    loads_on_gpu = Strategy.from_environment().replicates and not training_args.use_cpu
    if quantization is not None and trains_base_weights:
        raise ValueError("quantised weights cannot be trained in full: set load_in_4bit: false, or a part to lora")
    return load_base_model(
        model_args.model_name_or_path,
        dtype=dtype,
        quantization=quantization,
        attn_implementation=model_args.attn_implementation,
        # bitsandbytes quantises while it loads, on this process's GPU. Any other whole model is read straight to it, too:
        # the Trainer would move it later, page by page. Sharding strategies place weights themselves.
        device_map=device_map_of_this_process() if quantization is not None or loads_on_gpu else None,
        revision=model_args.model_revision,
    )


def device_map_of_this_process() -> dict[str, int | str]:
    """A `device_map` with all modules on the device of this process."""
    state = PartialState()
    return {"": state.local_process_index if state.device.type == "cuda" else state.device.type}


def check_adapter_is_complete(folder: Path, modules_to_save: Sequence[str]) -> None:
    """Raise ValueError if the adapter's file lacks one of `modules_to_save`, a part trained in full (LLaVA#844).

    PEFT would only warn, and use the base's own part.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = [name.split(".") for name in file.keys()]  # noqa: SIM118 - not a dict
    missing = [module for module in modules_to_save if not any(module in name for name in names)]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} was trained in full, but adapter_model.safetensors holds nothing of it: "
            "this folder is incomplete; use the run's folder as training wrote it"
        )


def load_for_inference(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
    asked_by: ProcessorMixin | PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """Model and processor of a base model, a run's folder (adapter or full weights) or a merged folder.

    The base of an adapter is named by its `adapter_config.json` and quantised as in training (`arguments.yaml`);
    `load_in_4bit` quantises any model. A base that is `asked_by` a run's processor cuts pictures into that one's tiles. The model is in evaluation mode, on the device of this process. Raises
    ValueError if the model, the adapter's `arguments.yaml` or a part of the adapter is missing.
    """
    folder = Path(name)
    dtype = dtype or inference_dtype()
    base, arguments = adapter_base(folder) or name, read_arguments(folder)
    is_adapter = base != name
    if is_adapter and arguments is None:
        raise ValueError(f"{name}: an adapter without the arguments.yaml that training writes beside it")
    if is_adapter:
        check_adapter_is_complete(folder, PeftConfig.from_pretrained(name).modules_to_save or [])
    model_args = ModelConfig(**{key: arguments[key] for key in QUANTISATION_KEYS if key in (arguments or {})})
    model_args.load_in_4bit |= load_in_4bit
    model = load_base_model(
        base,
        dtype=dtype,
        quantization=quantization_config(model_args, dtype),
        device_map=device_map_of_this_process(),
        revision=arguments.get("model_revision", "main") if is_adapter else "main",
    )
    if is_adapter:
        model = PeftModel.from_pretrained(model, name)
        for parameter in model.parameters():
            # PEFT loads parts trained in full in fp32; their inputs have the dtype of the base.
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
    keeps_own_template = arguments is not None or (folder / "merge_report.json").is_file()
    processing_class = load_saved_processing_class(folder) if keeps_own_template else load_processing_class(name)
    follow_tiles(base_model_of(model).config, asked_by or processing_class)
    return model.eval(), processing_class


def load_saved_processing_class(folder: Path) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor or tokenizer that training saved beside the weights, with its template and picture settings."""
    settings = folder / "processor_config.json"
    if not settings.is_file():
        return AutoTokenizer.from_pretrained(folder, **SAFE)
    kind = json.loads(settings.read_text(encoding="utf-8")).get("processor_class")
    processor_class = LlavaOnevisionProcessor if kind == LlavaOnevisionProcessor.__name__ else AutoProcessor
    return processor_class.from_pretrained(folder, **SAFE)
