"""Loading of weights: a base model for training, a run or a merged model for inference."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState, init_empty_weights
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
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
from finetuning.families import is_vision
from finetuning.models.parts import base_model_of
from finetuning.models.picture_parameters import load_adapter
from finetuning.models.processing import (
    SAFE,
    follow_tiles,
    load_config,
    pickles_refused,
    processing_class_for_inference,
)
from finetuning.run_folder import ADAPTER_WEIGHTS, adapter_base, read_arguments
from finetuning.strategy import Strategy

QUANTISATION_KEYS = [
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
]
# These stay in 16 bits when the base is quantised: the vision tower and projector are 5 % of LLaVA's weights, and TRL's
# fused loss reads the rows of `lm_head` directly. transformers matches the patterns from the start of a module's name.
NOT_QUANTISED = [".*vision_tower", ".*multi_modal_projector", "lm_head"]


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
        upstream.set_read(model, "transformers.core_model_loading", "_weight_conversions", None)
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
    strategy = Strategy.from_environment()
    loads_on_gpu = strategy.replicates and not training_args.use_cpu
    if quantization is not None and trains_base_weights:
        raise ValueError("quantised weights cannot be trained in full: set load_in_4bit: false, or a part to lora")
    if strategy.is_fsdp and quantization is None and not PartialState().is_main_process:
        return base_model_without_weights(model_args, dtype)
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


def base_model_without_weights(model_args: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a process that the first one will send its weights: memory that nobody has written, so none is taken.

    transformers 5.23 reads all weights in every process, `fsdp_cpu_ram_efficient_loading` or not, and those of another
    type than the run's lie in main memory once for each.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    config = load_config(name, revision)
    model_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(config, dtype=dtype, attn_implementation=model_args.attn_implementation)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    model.tie_weights()
    with suppress(OSError):  # few bases have none
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    if dtype == torch.float16 and config.model_type.startswith("gemma"):
        keep_residual_stream_in_fp32(model)
    return model.eval()


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
        model = load_adapter(model, name)
        for parameter in model.parameters():
            # PEFT loads parts trained in full in fp32; their inputs have the dtype of the base.
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
    processing_class = processing_class_for_inference(name)
    follow_tiles(base_model_of(model).config, asked_by or processing_class)
    return model.eval(), processing_class
