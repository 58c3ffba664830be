"""Models and their processors: what is loaded, from where, in which type."""

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
from trl import ModelConfig

from finetuning import upstream
from finetuning.arguments import TrainingArguments
from finetuning.device import inference_dtype, weight_dtype
from finetuning.run_folder import adapter_base, read_arguments
from finetuning.strategy import Strategy

CHAT_TEMPLATES = Path(__file__).parents[1] / "chat_templates"
TEMPLATE_OF = {"llava": "llava.jinja", "gemma": "gemma.jinja", "gemma2": "gemma.jinja", "gemma3_text": "gemma.jinja"}
GEMMA_TURN_MARKS = ["<start_of_turn>", "<end_of_turn>"]
QUANTISATION_KEYS = [
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
]
# Left in 16 bits when the base is quantised: what sees the picture is 5 % of LLaVA's weights, and the rows of
# `lm_head` are read directly by TRL's fused loss. transformers matches these from the start of a module's name.
NOT_QUANTISED = [".*vision_tower", ".*multi_modal_projector", "lm_head"]


def load_config(name: str, revision: str = "main") -> PreTrainedConfig:
    """Config of a Hub model or a folder. Raises ValueError that says how to get what is missing."""
    looks_like_folder = name.startswith((".", "/", "~", "models/", "outputs/")) or Path(name).exists()
    if looks_like_folder and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{name}: no model here (config.json is missing). A tiny one to try things on: python "
            f"scripts/make_tiny_model.py --architecture llava --pretrain --output {name}; a real one: hf download "
            f"llava-hf/llava-1.5-7b-hf --local-dir {name}"
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{name}: neither a folder nor a model that could be reached on the Hub ({str(error).splitlines()[0]}). "
            "Check the name and the network; for a gated model accept its licence on its page and set HF_TOKEN; "
            "on a machine without network download it before and set HF_HUB_OFFLINE=1"
        ) from error
    # Which attention computes is the recipe's and the GPU's to say. Left in, FlashAttention that a config names is asked
    # for even where another is given (LLaVA-NeXT#224).
    upstream.replace(config, "_attn_implementation", None)
    return config


def is_vision(config: PreTrainedConfig) -> bool:
    return hasattr(config, "vision_config")


def load_processing_class(
    name: str, *, image_aspect_ratio: str = "pad", chat_template_path: str | None = None, revision: str = "main"
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Processor (vision models) or tokenizer, with the template that training and asking share.

    The project's template of the model's type is set, or the file `chat_template_path`. With
    `image_aspect_ratio="pad"` pictures are made square by padding (`do_pad` of transformers' LlavaImageProcessor)
    before they are resized; with "crop" the published processor cuts out their centre.
    """
    config = load_config(name, revision)
    processing_class = (AutoProcessor if is_vision(config) else AutoTokenizer).from_pretrained(name, revision=revision)
    if is_vision(config) and image_aspect_ratio == "pad":
        settings = processing_class.image_processor.to_dict() | {"do_pad": True}
        settings.pop("image_processor_type")
        processing_class.image_processor = LlavaImageProcessor(**settings)
    if chat_template_path is None and config.model_type in TEMPLATE_OF:
        chat_template_path = CHAT_TEMPLATES / TEMPLATE_OF[config.model_type]
    if config.model_type.startswith("gemma"):
        # They stand in every Gemma vocabulary, but where the tokenizer's settings do not list them as special
        # (google/gemma-2b, for one) transformers 5 cuts them into letters.
        processing_class.add_tokens(GEMMA_TURN_MARKS, special_tokens=True)
        # What ends an answer, for whoever serves the tuned model by its tokenizer; <eos> would end a document.
        processing_class.eos_token = GEMMA_TURN_MARKS[1]
    if chat_template_path is not None:
        processing_class.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    return processing_class


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


def load_base_model(
    name: str,
    *,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    attn_implementation: str | None = None,
    device_map: dict[str, int | str] | None = None,
    revision: str = "main",
) -> PreTrainedModel:
    """The model class that the config of `name` asks for; a Gemma in fp16 keeps its residual stream in fp32."""
    config = load_config(name, revision)
    model_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    model = model_class.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=attn_implementation,
        device_map=device_map,
        revision=revision,
    )
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 remembers there every renaming that it knows, not those that these files needed, and would
        # save the weights under names that no class has. Forgotten, the class's own are taken.
        upstream.check_read("transformers.core_model_loading", "_weight_conversions")
        model._weight_conversions = None
    if quantization is not None and quantization.load_in_4bit:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                # Else bitsandbytes, on a CPU that has it, packs 4-bit weights anew at the first answer: no gradient
                # passes through them after that, scales are rounded to bf16, and rows not of whole blocks are an error.
                upstream.replace(module, "support_avx512bf16_for_cpu", False)
    if dtype == torch.float16 and config.model_type.startswith("gemma"):
        keep_residual_stream_in_fp32(model)
    return model


def keep_residual_stream_in_fp32(model: PreTrainedModel) -> None:
    """Sum a Gemma's residual stream in fp32, while every product stays in fp16: for GPUs that have no bf16 (a T4).

    fp16 ends at 65,504. The sums after the layers of Gemma-3-270M reach 103,821 on an ordinary question, and the loss
    becomes NaN (google/gemma_pytorch#24); what its linear layers give stays below. So the embedding gives fp32, which
    all sums inherit, and what the norms and the rotary embedding hand on to the linear layers and the attention is fp16.
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
    """The base as the recipe wants it: quantised or not, in the run's precision, on this process's device.

    Frozen weights are held in the 16-bit type of the run. `trains_base_weights` (a part is trained in full and nothing
    is LoRA) holds all of them in fp32, since 16-bit weights lose small updates, unless DeepSpeed does that itself;
    `dtype` overrides both.
    """
    dtype = weight_dtype(training_args.fp16, training_args.bf16)
    if model_args.dtype != "auto":
        dtype = getattr(torch, model_args.dtype)
    elif trains_base_weights and not Strategy.from_environment().is_deepspeed:
        dtype = torch.float32
    quantization = quantization_config(model_args, weight_dtype(training_args.fp16, training_args.bf16))
    if quantization is not None and trains_base_weights:
        raise ValueError("quantised weights cannot be trained in full: set load_in_4bit: false, or a part to lora")
    return load_base_model(
        model_args.model_name_or_path,
        dtype=dtype,
        quantization=quantization,
        attn_implementation=model_args.attn_implementation,
        # bitsandbytes quantises while it loads: straight onto this process's GPU. The trainer moves any other model.
        device_map=device_map_of_this_process() if quantization is not None else None,
        revision=model_args.model_revision,
    )


def device_map_of_this_process() -> dict[str, int | str]:
    """A device map that puts everything on this process's device."""
    state = PartialState()
    return {"": state.local_process_index if state.device.type == "cuda" else state.device.type}


def check_adapter_is_complete(folder: Path, modules_to_save: Sequence[str]) -> None:
    """Raise ValueError if a part that was trained in full is missing from the adapter's file (LLaVA#844).

    PEFT would fall back to the base's own part with a warning.
    """
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = [name.split(".") for name in file.keys()]  # noqa: SIM118 - not a dict
    missing = [module for module in modules_to_save if not any(module in name for name in names)]
    if missing:
        raise ValueError(
            f"{folder}: {', '.join(missing)} was trained in full, but adapter_model.safetensors holds nothing of it: "
            "this folder is incomplete; use the run's folder as training wrote it"
        )


def load_for_inference(
    name: str, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """A base model, a run's folder (adapter over its base, or full weights) or a merged folder -> model, processor.

    The base of an adapter is read from its `adapter_config.json`, and is quantised as it was in training
    (`arguments.yaml`); `load_in_4bit` quantises any model. Returns the model in evaluation mode on this process's device.
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
            # Parts trained in full come back in fp32, and their inputs in the type of the base.
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
    keeps_own_template = arguments is not None or (folder / "merge_report.json").is_file()
    return model.eval(), load_saved_processing_class(folder) if keeps_own_template else load_processing_class(name)


def load_saved_processing_class(folder: Path) -> ProcessorMixin | PreTrainedTokenizerBase:
    """What training saved beside the weights: template and picture settings are taken as they are."""
    is_processor = (folder / "processor_config.json").is_file()
    return (AutoProcessor if is_processor else AutoTokenizer).from_pretrained(folder)
