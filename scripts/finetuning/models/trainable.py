"""Which weights are trainable: each part of the model is frozen, gets LoRA or is trained in full."""

import re
from contextlib import nullcontext

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finetuning.arguments import ModelArguments, ScriptArguments
from finetuning.models.adapter_start import adapter_of, changes_base
from finetuning.models.parts import MODULE_OF, count_parameters, part_of, parts_of
from finetuning.models.picture_parameters import picture_parameters
from finetuning.strategy import Strategy


def gets_no_gradient(name: str, config: PreTrainedConfig) -> bool:
    """Whether the parameter or module `name` comes after the vision layer that LLaVA reads, where no gradient arrives.

    LLaVA-1.5 reads `hidden_states[-2]`: the last CLIP block and the final norm get no gradient, and DDP fails if they
    are trainable (LlamaFactory#6376, ms-swift#587).
    """
    if part_of(name) != "vision_tower":
        return False
    if not hasattr(config, "vision_feature_layer"):
        return False  # Gemma 3 reads what comes out of the tower
    read = config.vision_feature_layer
    num_layers = config.vision_config.num_hidden_layers
    # hidden_states has num_layers + 1 entries: the embeddings, then the output of each layer.
    deepest = max(
        layer if layer >= 0 else num_layers + 1 + layer for layer in ([read] if isinstance(read, int) else read)
    )
    layer = re.search(r"\.layers\.(\d+)\.", name + ".")
    return "post_layernorm" in name or (layer is not None and int(layer.group(1)) >= deepest)


def set_trainable(
    model: PreTrainedModel, script_args: ScriptArguments, model_args: ModelArguments
) -> PreTrainedModel | PeftModel:
    """Freeze each part, give it LoRA adapters or train it in full, as the recipe says. Trainable weights become fp32.

    Under DeepSpeed they keep the dtype of the base: DeepSpeed holds fp32 masters itself, and ZeRO-3 cannot all-gather
    weights of two dtypes (DeepSpeed#8072).

    Returns a PeftModel if any part is `lora`, else the same model. Parts trained in full beside LoRA are PEFT's
    `modules_to_save`, so that the adapter folder holds everything that was trained (LLaVA#844: projector lost). Vectors
    beside the projector follow it, and are saved by `models/picture_parameters.py`: PEFT knows modules only.
    Raises ValueError if all parts are frozen, if the language model is trained in full beside LoRA, or if the trainable
    parameters differ from the recipe in the end.
    """
    wanted = {part: script_args.placement[part] for part in parts_of(model)}
    deepspeed = Strategy.from_environment().is_deepspeed
    if set(wanted.values()) == {"frozen"}:
        raise ValueError(f"every part is frozen ({', '.join(wanted)}): set at least one of them to lora or full")
    if "lora" in wanted.values():
        if wanted["language_model"] == "full":
            raise ValueError(
                "language_model: full beside LoRA on another part would save the full language model in the "
                "adapter: set language_model to lora or frozen, or the other parts to full or frozen"
            )
        # Without weights, where memory is planned, there is nothing to begin from.
        start = None if model.device.type == "meta" else model_args.init_lora_weights
        start = None if start == "eva" else start  # set later, from rows (`training/eva.py`)
        lora = LoraConfig(
            task_type=model_args.lora_task_type,
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            use_rslora=model_args.use_rslora,
            use_dora=model_args.use_dora,
            init_lora_weights=start or True,
            target_modules=lora_targets(model, wanted, model_args.lora_target_modules),
            modules_to_save=[MODULE_OF[part] for part in wanted if wanted[part] == "full"] or None,
        )
        # Where the base lies on a GPU the adapters are drawn there: of a 7B the CPU draws 320 million numbers in seconds.
        with model.device if model.device.type == "cuda" else nullcontext():
            model = get_peft_model(model, lora, autocast_adapter_dtype=not deepspeed)
        if changes_base(start):
            model.adapter_start = adapter_of(model)
        for parameter in picture_parameters(model).values():
            parameter.requires_grad_(wanted["projector"] == "full")
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[part_of(name)] == "full")
    for name, parameter in model.named_parameters():
        if gets_no_gradient(name, model.config):
            parameter.requires_grad_(False)
        if parameter.requires_grad and not deepspeed:
            parameter.data = parameter.data.float()
    check_trainable(model, wanted)
    return model


def lora_targets(model: nn.Module, wanted: dict[str, str], suffixes: list[str] | str | None) -> str:
    """A regular expression that matches the full names of the linear layers that get LoRA, and no others.

    `wanted` is part -> `frozen`, `lora` or `full`. `suffixes` is `lora_target_modules` of the recipe: None or
    `all-linear` for every linear layer of the `lora` parts, or last names such as q_proj, matched in those parts only.
    (PEFT alone would match them in the vision tower too: LLaVA#1380, peft#2615.) Raises ValueError for a suffix without
    a match.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and wanted[part_of(name)] == "lora"
        and name != "lm_head"
        and not gets_no_gradient(name, model.config)
    ]
    if suffixes not in (None, "all-linear"):
        suffixes = [suffixes] if isinstance(suffixes, str) else suffixes
        available = sorted({name.rpartition(".")[2] for name in linear})
        unknown = [suffix for suffix in suffixes if suffix not in available]
        if unknown:
            raise ValueError(
                f"lora_target_modules: {unknown} match no linear layer of the parts that are lora; there are "
                f"{available}. On the command line they are separated by spaces, without commas"
            )
        linear = [name for name in linear if name.rpartition(".")[2] in suffixes]
    patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in linear}
    if any(part_of(pattern) == "vision_tower" for pattern in patterns):
        # One pattern for all blocks would match the last one too, which gets no gradient.
        patterns = {
            name if part_of(name) == "vision_tower" else re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in linear
        }
    return "|".join(re.escape(pattern).replace(r"\#", r"\d+") for pattern in sorted(patterns))


def check_trainable(model: nn.Module, wanted: dict[str, str]) -> None:
    """Raise ValueError unless each part is `frozen`, `lora` or `full` as `wanted` says."""
    problems = []
    for part, count in count_parameters(model).items():
        found = "frozen" if not count["trainable"] else "lora" if count["trainable"] == count["lora"] else "full"
        if found != wanted[part]:
            problems.append(
                f"{part}: the recipe says {wanted[part]}, but it is {found} ({count['trainable']:,} trainable)"
            )
    if problems:
        raise ValueError("what would be trained is not what the recipe says: " + "; ".join(problems))


def describe_trainable(model: nn.Module) -> str:
    """A line for each part and one for all: trainable parameters of how many."""
    counts = count_parameters(model)
    lines = [
        f"  {part:<15}{count['trainable']:>15,} of {count['total']:>15,} parameters trained"
        for part, count in counts.items()
    ]
    if counts.get("projector", {}).get("lora"):
        lines += [
            f"  {name.rpartition('.')[2]} stays as it is: LoRA adapts matrices" for name in picture_parameters(model)
        ]
    trainable, total = (sum(count[key] for count in counts.values()) for key in ("trainable", "total"))
    return "\n".join([*lines, f"  {'all':<15}{trainable:>15,} of {total:>15,} ({trainable / total:.4%})"])
