"""Options against what they need: CUDA graphs, FP8, and options of TRL that do not work here."""

from datasets import Dataset
from transformers import PreTrainedConfig

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.data.augmentation import names_sides
from finetuning.data.shared_prefix import uses_shared_prefix
from finetuning.kernels.lora_layers import PROJECTIONS, TWO_NORM_LAYERS
from finetuning.models.adapter_start import changes_base
from finetuning.preflight.step_time import has_8_bit_products
from finetuning.strategy import CONFIGS, Strategy


def option_problems(training_args: TrainingArguments, capability: tuple[int, int] | None) -> list[str]:
    """Options of transformers and TRL that would end in a stack trace, or in another training; `capability` is None without a GPU."""
    problems = []
    if training_args.use_liger_kernel:
        problems.append(
            "use_liger_kernel: the kernels of this project replace the layers that Liger would replace. Remove it from "
            "the recipe; fused_lora: true is the default and faster"
        )
    if training_args.activation_offloading and capability is None:
        problems.append(
            "activation_offloading moves activations from a GPU to main memory, and there is no GPU: remove it from the "
            "recipe"
        )
    if training_args.auto_find_batch_size:
        problems.append(
            "auto_find_batch_size makes batches smaller until they fit and steps with them: a step of 16 rows becomes one of "
            "4, at the same learning rate. Set global_batch_size and a smaller per_device_train_batch_size; "
            "checkpoint_layers: auto makes room by itself"
        )
    return problems


def rate_problems(script_args: ScriptArguments, training_args: TrainingArguments) -> list[str]:
    """Learning rates of parts that are not trained, or of adapters that are not there: they would be ignored."""
    problems = []
    for part in ("projector", "vision_tower"):
        rate = getattr(training_args, f"learning_rate_{part}")
        if rate is not None and script_args.placement[part] == "frozen":
            problems.append(
                f"learning_rate_{part}: {rate}, but {part} is frozen: remove it, or set {part} to lora or full"
            )
    ratio = training_args.lora_plus_ratio
    if ratio is not None and "lora" not in script_args.placement.values():
        problems.append(f"lora_plus_ratio: {ratio}, but no part has LoRA: remove it, or set a part to lora")
    if ratio is not None and ratio <= 0:
        problems.append(f"lora_plus_ratio: {ratio}, expected a number above 0, such as 16")
    given = (training_args.learning_rate_projector, training_args.learning_rate_vision_tower, ratio)
    if any(value is not None for value in given) and any(
        name in training_args.optim.value for name in ("layerwise", "lomo")
    ):
        problems.append(
            f"optim: {training_args.optim.value} has no groups of parameters for rates of parts: set adamw_torch"
        )
    return problems


def start_problems(script_args: ScriptArguments, model_args: ModelArguments) -> list[str]:
    """`init_lora_weights` against what it would change: a base that is quantised or sharded cannot give directions away."""
    start, problems = model_args.init_lora_weights, []
    if start is None:
        return []
    if "lora" not in script_args.placement.values():
        problems.append(f"init_lora_weights: {start}, but no part has LoRA: remove it, or set a part to lora")
    if changes_base(start) and (model_args.load_in_4bit or model_args.load_in_8bit):
        problems.append(
            f"init_lora_weights: {start} takes directions out of the base, which quantised weights would lose in rounding: set "
            "load_in_4bit: false, or remove init_lora_weights"
        )
    launch = Strategy.from_environment()
    if changes_base(start) and (launch.shards_weights or launch.is_deepspeed):
        problems.append(
            f"init_lora_weights: {start} decomposes whole weights and keeps adapters in fp32, which a launch by {launch} does not: "
            f"launch with {CONFIGS}/ddp.yaml"
        )
    if start == "eva" and launch.shards_weights:
        problems.append(
            f"init_lora_weights: eva asks the whole model before it is trained, which a launch by {launch} holds in shards: "
            f"launch with {CONFIGS}/ddp.yaml"
        )
    return problems


def graph_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    rows: Dataset,
    capability: tuple[int, int] | None,
) -> list[str]:
    """`cuda_graphs` against all that a recorded pass cannot do."""
    if not script_args.cuda_graphs:
        return []
    how, attention = Strategy.from_environment(), model_args.attn_implementation or "sdpa"
    rows_side_by_side = training_args.packing or training_args.padding_free
    layers = script_args.checkpoint_layers if training_args.gradient_checkpointing else "0"
    cannot = {
        "images in the rows: their steps keep a GPU busy as it is": "images" in rows.column_names,
        "no GPU of compute capability 8.0 or newer": capability is None or capability < (8, 0),
        f"a launch by {how}: gradients are averaged while the passes run": not how.is_one_process,
        "fused_lora: false": not script_args.fused_lora,
        "use_dora: true": model_args.use_dora,
        f"language_model: {script_args.language_model}": script_args.language_model != "lora",
        f"attn_implementation: {attention} (sdpa or packed would do)": attention not in ("sdpa", "packed"),
        f"attn_implementation: {attention} with rows side by side (packed would do)": rows_side_by_side
        and attention == "sdpa",
        f"checkpoint_layers: {layers} (auto or 0 would do)": layers not in ("auto", "0"),
        "gradient_checkpointing_kwargs": training_args.gradient_checkpointing
        and bool(training_args.gradient_checkpointing_kwargs),
    }
    found = [reason for reason, holds in cannot.items() if holds]
    return [f"cuda_graphs cannot go with {'; '.join(found)}: set cuda_graphs: false, or change that"] if found else []


def number_loss_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    rows: Dataset,
) -> list[str]:
    """`number_loss` against all that would ignore it, or lay the rows out otherwise."""
    name, attention = script_args.number_loss, model_args.attn_implementation or "sdpa"
    if name is None:
        return []
    cannot = {
        f"loss_type: {training_args.loss_type} (nll would do)": training_args.loss_type != "nll",
        "label_smoothing_factor": bool(training_args.label_smoothing_factor),
        "cuda_graphs: true": script_args.cuda_graphs,
    }
    if name == "crps":
        cannot |= {
            "rows of text alone (ntl would do)": "images" not in rows.column_names,
            "dialogues that share an image (share_image_prefix: false, or one question an image, would do)": (
                "images" in rows.column_names and uses_shared_prefix(script_args, rows, config)
            ),
            f"attn_implementation: {attention} (sdpa would do)": attention != "sdpa",
        }
    found = [reason for reason, holds in cannot.items() if holds]
    return (
        [f"number_loss: {name} cannot go with {'; '.join(found)}: change that, or remove number_loss"] if found else []
    )


def augmentation_problems(script_args: ScriptArguments, training_args: TrainingArguments, rows: Dataset) -> list[str]:
    """`image_augmentation` of rows without pictures, in an order that tells no epoch, or that would make a text untrue."""
    kinds, problems = script_args.image_augmentation, []
    if not kinds:
        return []
    if "images" not in rows.column_names:
        return ["image_augmentation has no effect: the rows hold no pictures. Remove it"]
    if training_args.train_sampling_strategy != "random":
        problems.append(
            f"image_augmentation cannot go with train_sampling_strategy: {training_args.train_sampling_strategy}, which tells "
            "no epoch: set train_sampling_strategy: random, or remove it"
        )
    if "flip" in kinds and (found := names_sides(rows)):
        problems.append(
            f"image_augmentation: flip would make row {found[0]} untrue, which says {found[1]!r:.90}: leave flip out. Texts "
            "are searched for left, right, clockwise, 왼쪽, 오른쪽 and words like them"
        )
    return problems


def base_precision_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    capability: tuple[int, int] | None,
    config: PreTrainedConfig,
) -> list[str]:
    """`base_precision` against GPU, launch, recipe and the shape of the model."""
    if script_args.base_precision is None:
        return []
    is_int8 = script_args.base_precision == "int8"
    targets, launch = model_args.lora_target_modules, Strategy.from_environment()
    missing = set() if targets in (None, "all-linear", ["all-linear"]) else {*PROJECTIONS} - {*targets}
    text = config.get_text_config()
    uneven = uneven_widths(text, 128 if is_int8 else 16)
    kinds = [layer.__name__.removesuffix("DecoderLayer").lower() for layer in TWO_NORM_LAYERS]
    cannot = {
        **gpu_problems(is_int8, capability),
        "fp16: true (bf16 would do)": training_args.fp16,
        "quantised weights (load_in_4bit: false would do)": (
            model_args.load_in_8bit or (model_args.load_in_4bit and not is_int8)
        ),
        f"language_model: {script_args.language_model} (lora would do)": script_args.language_model != "lora",
        "fused_lora: false (true would do)": not script_args.fused_lora,
        "use_dora: true (false would do)": model_args.use_dora,
        f"lora_r: {model_args.lora_r} (a multiple of 8 would do)": is_int8 and model_args.lora_r % 8 != 0,
        f"lora_target_modules without {', '.join(sorted(missing))} (all-linear would do)": bool(missing),
        f"a launch by {launch}, where weights come and go ({CONFIGS}/ddp.yaml or deepspeed_zero2.yaml would do)": (
            launch.shards_weights
        ),
        f"a launch by {launch} ({CONFIGS}/ddp.yaml would do)": (
            is_int8 and launch.is_deepspeed and not launch.shards_weights
        ),
        f"a model of type {text.model_type} ({' or '.join(kinds)} would do)": text.model_type not in kinds,
        f"layers of width {', '.join(map(str, uneven))} (multiples of {128 if is_int8 else 16} would do)": bool(uneven),
    }
    found = [reason for reason, holds in cannot.items() if holds]
    how = f"base_precision: {script_args.base_precision}"
    return [f"{how} cannot go with {'; '.join(found)}: leave base_precision out, or change that"] if found else []


def gpu_problems(is_int8: bool, capability: tuple[int, int] | None) -> dict[str, bool]:
    """What stands against a GPU of that compute capability (None: a CPU) -> whether it does."""
    needed = "9.0" if is_int8 else "8.9 or newer"
    suffices = capability is not None and has_8_bit_products("int8" if is_int8 else "fp8_backward", capability)
    return {
        f"a CPU (compute capability {needed} would do)": capability is None,
        f"compute capability {'.'.join(map(str, capability or ()))} ({needed} would do)": (
            capability is not None and not suffices
        ),
    }


def uneven_widths(text: PreTrainedConfig, unit: int) -> list[int]:
    """Widths of a decoder's linear layers that are no multiple of `unit`."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    widths = [text.hidden_size, text.intermediate_size]
    widths += [heads * head_dim for heads in (text.num_attention_heads, text.num_key_value_heads)]
    return sorted({width for width in widths if width % unit})
