"""Types and attention kernels against the GPU and the rows. Each rule returns the sentence for people, or None."""

import importlib.util

from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.utils import is_kernels_available

from finetuning.arguments import ModelArguments, ScriptArguments, TrainingArguments
from finetuning.data.shared_prefix import uses_shared_prefix
from finetuning.device import weight_dtype

# Compute capability and package that each needs.
FLASH_ATTENTION = {
    "flash_attention_2": ((8, 0), "flash_attn"),
    "flash_attention_3": ((9, 0), "flash_attn_interface"),
}


def precision_problems(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    rows: Dataset,
    capability: tuple[int, int] | None,
    config: PreTrainedConfig,
) -> list[str]:
    """Types and attention against the GPU and the rows: `capability` as CUDA gives it, None without a GPU."""
    attention = model_args.attn_implementation or "sdpa"
    with_images = "images" in rows.column_names
    if attention in FLASH_ATTENTION:
        unavailable = flash_attention(attention, training_args, capability)
    else:
        unavailable = other_attention(attention, capability, with_images=with_images)
    shares = with_images and attention.startswith("flash_attention") and uses_shared_prefix(script_args, rows, config)
    found = [
        mixed_types(script_args, training_args, model_args),
        unavailable,
        flash_attention_of_a_shared_prefix(attention) if shares else None,
    ]
    return [problem for problem in found if problem]


def mixed_types(
    script_args: ScriptArguments, training_args: TrainingArguments, model_args: ModelArguments
) -> str | None:
    """Weights in another 16-bit type than the run computes in."""
    computes = str(weight_dtype(training_args.fp16, training_args.bf16)).removeprefix("torch.")
    # Where nothing computes in 16 bits, adapters bring their input into their own type; parts trained in full do not.
    any_goes = computes == "float32" and "full" not in script_args.placement.values()
    if model_args.dtype in ("auto", "float32", computes) or any_goes:
        return None
    return (
        f"dtype: {model_args.dtype}, but this run computes in {computes}, and the two do not mix (unsloth#7506: "
        "BFloat16 != Half): remove dtype, the weights then follow the run"
    )


def flash_attention(attention: str, training_args: TrainingArguments, capability: tuple[int, int] | None) -> str | None:
    """FlashAttention against GPU, installation and precision."""
    needs, package = FLASH_ATTENTION[attention]
    if capability is None:
        return f"attn_implementation: {attention} needs a GPU: set attn_implementation: sdpa"
    if capability < needs:
        return (
            f"attn_implementation: {attention} needs compute capability {needs[0]}.{needs[1]}, this GPU has "
            f"{capability[0]}.{capability[1]} (LLaVA-NeXT#224): set attn_implementation: sdpa"
        )
    if importlib.util.find_spec(package) is None:
        return (
            f"attn_implementation: {attention}, but {package} is not installed: set attn_implementation: sdpa, "
            "which PyTorch brings and which is as fast on LLaVA's rows"
        )
    if not (training_args.fp16 or training_args.bf16):
        return f"attn_implementation: {attention} computes in 16 bits only: set bf16: true or sdpa"
    return None


def other_attention(attention: str, capability: tuple[int, int] | None, *, with_images: bool) -> str | None:
    """Attention that is not installed, not for these rows, or not known."""
    if "/" in attention and not is_kernels_available():
        return (
            f"attn_implementation: {attention} comes from the Hub by the package kernels, which is not installed: set "
            "attn_implementation: sdpa"
        )
    if attention == "flex_attention" and capability is None:
        return "attn_implementation: flex_attention has no backward pass on a CPU: set attn_implementation: sdpa"
    if attention == "packed" and with_images:
        return "attn_implementation: packed is for text, rows with images are not packed: set sdpa"
    if "/" not in attention and attention not in ("sdpa", "packed", "eager", "flex_attention"):
        return (
            f"attn_implementation: {attention} is unknown; there are sdpa, packed, eager, flex_attention, flash_attention_2, "
            "flash_attention_3"
        )
    return None


def flash_attention_of_a_shared_prefix(attention: str) -> str:
    """FlashAttention where dialogues share their image: it takes no mask."""
    return (
        f"attn_implementation: {attention} takes no mask, which dialogues that share their image need: set "
        "attn_implementation: sdpa, or share_image_prefix: false"
    )
