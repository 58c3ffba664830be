"""Every name of another library that this project replaces or overrides, and the versions it was tested with.

A release may rename what is private. Python would then set an attribute that nobody reads, or define a method that
nobody calls, without a word: the project would go on, slower or wrong. So each such name stands in ENTRIES, modules
change it through `replace` and `overrides`, and both raise UpstreamChanged where the name is gone or takes other
arguments. tests/support/proofs.py names for each entry the test that fails without it.
"""

import inspect
import re
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

# The first of each is the pin of requirements.txt.
TESTED = {
    "accelerate": ["1.15.0"],
    "bitsandbytes": ["0.50.2"],
    "deepspeed": ["0.19.8"],
    "peft": ["0.21.2"],
    "torch": ["2.13.0"],
    "transformers": ["5.23.0", "5.24.0"],
    "trl": ["1.16.0"],
}


class UpstreamChanged(ValueError):
    """A library no longer has what this project replaces; the message names the tested and the installed version."""


class Entry(NamedTuple):
    """A module or class of a library, a name in it, why it is changed, and of a function the arguments as tested."""

    owner: str
    name: str
    why: str
    arguments: tuple[str, ...] = ()  # any of these, `self` left out; empty where they do not matter

    @property
    def library(self) -> str:
        """Name of the package, as pip knows it."""
        return self.owner.partition(".")[0]


MODULE = "torch.nn.modules.module.Module"
LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ENGINE = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine.TorchCheckpointEngine"
TRAINER = "transformers.trainer.Trainer"
CACHE = ("past_key_values", "cache")  # keys and values of earlier tokens: transformers 5.23, 5.24
DECODER_LAYER = tuple(
    f"hidden_states, attention_mask, position_ids, {cache}, use_cache, position_embeddings, **kwargs" for cache in CACHE
)

ENTRIES = [
    # Overridden in training/
    Entry(
        TRAINER,
        "_run_epoch",
        "trains no step behind the last one",
        (
            "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
            "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        ),
    ),
    Entry(TRAINER, "get_batch_samples", "times the wait for data", ("epoch_iterator, num_batches, device",)),
    Entry(TRAINER, "_get_num_items_in_batch", "counts supervised tokens on the GPU", ("batch_samples, device",)),
    Entry(TRAINER, "_clip_grad_norm", "leaves DeepSpeed's norm on the GPU", ("model",)),
    Entry(TRAINER, "_get_grad_norm", "leaves DeepSpeed's norm on the GPU", ("model, grad_norm",)),
    Entry(TRAINER, "_build_accelerator_args", "lets DDP average gradients where they lie", ("**kwargs",)),
    Entry(TRAINER, "floating_point_ops", "counts the parameters once, not at every step", ("inputs",)),
    Entry(TRAINER, "_get_dataloader", "lets loader workers outlive Slurm's signals", (
        "dataset, description, batch_size, sampler_fn, is_training, dataloader_key",
    )),
    Entry(TRAINER, "_get_output_dir", "writes checkpoints aside until they are whole", ("trial",)),
    Entry(TRAINER, "_save_checkpoint", "moves whole checkpoints into place", ("model, trial",)),
    Entry(TRAINER, "_load_from_checkpoint", "names on disk are not the model's", ("resume_from_checkpoint, model",)),
    Entry(TRAINER, "_load_best_model", "names on disk are not the model's"),
    Entry(TRAINER, "train", "continues the count of tokens, and ends well when a signal comes"),
    Entry(TRAINER, "_finalize_training", "tells of the whole run after a restart", ("trial, num_train_samples, start_time",)),
    Entry(TRAINER, "training_step", "repeats a step that ran out of memory with more layers checkpointed"),
    Entry(TRAINER, "compute_loss", "reads loss and metrics when the GPU has come so far"),
    Entry(TRAINER, "log", "adds speed, data wait and memory"),
    Entry(TRAINER, "evaluate", "asks questions"),
    Entry("trl.trainer.sft_trainer.SFTTrainer", "_prepare_dataset", "refuses rows that would be cut", (
        "dataset, processing_class, args, packing, formatting_func, dataset_name",
    )),
    Entry(TRAINER, "create_optimizer", "divides parameters by learning rate", ("model",)),
    Entry(TRAINER, "evaluation_loop", "averages the validation loss over tokens, not over batches"),
    Entry(TRAINER, "save_model", "saves sharded weights whole"),
    Entry(TRAINER, "create_model_card", "writes none: TRL's is of a model named None"),
    # Replaced in training/
    Entry("transformers.training_args.TrainingArguments", "gradient_checkpointing", "leaves the choice of layers to us"),
    Entry("transformers.training_args.TrainingArguments", "activation_checkpointing", "its second name"),
    Entry(LAYER, "gradient_checkpointing", "checkpoints as few layers as fit"),
    Entry(LAYER, "_gradient_checkpointing_func", "checkpoints without reentrance"),
    Entry("trl.trainer.sft_trainer.SFTTrainer", "_total_train_tokens", "goes on counting after an interruption"),
    Entry(TRAINER, "_initial_global_step", "tells of the whole run after a restart"),
    Entry(TRAINER, "_total_loss_scalar", "tells of the whole run after a restart"),
    Entry("torch.utils.data.dataloader.DataLoader", "worker_init_fn", "lets loader workers outlive Slurm's signals"),
    Entry("torch.utils.data.dataloader.DataLoader", "__iter__", "reads the next epoch's first batches ahead"),
    # data/
    Entry("torch.utils.data.dataloader.DataLoader", "collate_fn", "changes training pictures"),
    Entry("accelerate.data_loader.SeedableRandomSampler", "__iter__", "tells which epoch is read"),
    Entry("accelerate.data_loader.SeedableRandomSampler", "__class__", "tells which epoch is read"),
    Entry("transformers.processing_utils.ProcessorMixin", "_adjust_assistant_masks_indices", "reads offsets as lists", (
        "processed_dict, generation_indices",
    )),
    # models/
    Entry(MODULE, "train", "visits all modules only when the mode changes", ("mode",)),
    Entry(MODULE, "named_parameters", "walks through all modules once", ("prefix, recurse, remove_duplicate",)),
    Entry("transformers.configuration_utils.PreTrainedConfig", "_attn_implementation", "leaves attention to the recipe"),
    Entry("transformers.core_model_loading", "_weight_conversions", "saves under the class's own names"),
    Entry("bitsandbytes.nn.modules.Linear4bit", "support_avx512bf16_for_cpu", "keeps 4-bit weights as loaded"),
    # kernels/
    Entry("transformers.models.llama.modeling_llama.LlamaDecoderLayer", "forward", "fuses LoRA", DECODER_LAYER),
    Entry("transformers.models.mistral.modeling_mistral.MistralDecoderLayer", "forward", "fuses LoRA", DECODER_LAYER),
    Entry("transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer", "forward", "fuses LoRA", DECODER_LAYER),
    Entry("transformers.models.gemma.modeling_gemma.GemmaDecoderLayer", "forward", "fuses LoRA", DECODER_LAYER),
    Entry("transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer", "forward", "fuses LoRA", (
        "hidden_states, position_embeddings, attention_mask, position_ids, past_key_values, **kwargs",
        "hidden_states, position_embeddings, attention_mask, position_ids, cache, **kwargs",
    )),
    Entry("peft.tuners.lora.layer.Linear", "forward", "fuses LoRA", ("x, *args, **kwargs",)),
    Entry("torch.Tensor", "data", "stacks weights"),
    Entry("bitsandbytes.functional.QuantState", "absmax", "stacks 4-bit weights"),
    Entry("bitsandbytes.functional.QuantState", "nested", "stacks 4-bit weights"),
    Entry(MODULE, "forward", "loss of supervised rows, frozen tower, its activation, CUDA graphs"),
    Entry(
        "transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionModel", "get_placeholder_mask",
        "counts image tokens once", ("input_ids, inputs_embeds, image_features, video_features",),
    ),
    *(
        Entry(f"transformers.models.{model}", "get_placeholder_mask", "counts image tokens once", (
            "input_ids, inputs_embeds, image_features",
        ))
        for model in (
            "llava.modeling_llava.LlavaModel",
            "vipllava.modeling_vipllava.VipLlavaModel",
            "llava_next.modeling_llava_next.LlavaNextModel",
            "gemma3.modeling_gemma3.Gemma3Model",
        )
    ),
    # distributed/
    Entry("accelerate.state.PartialState", "wait_for_everyone", "waits without a time-out", ("",)),
    Entry("accelerate.utils.dataclasses.FullyShardedDataParallelPlugin", "mixed_precision_policy", "averages in fp32"),
    Entry("transformers.modeling_utils.PreTrainedModel", "_no_split_modules", "names what FSDP2 wraps"),
    Entry("deepspeed.runtime.zero.stage_1_and_2", "is_invalid_grad_norm", "never waits for the norm", ("norm",)),
    Entry("deepspeed.runtime.zero.stage3", "is_invalid_grad_norm", "never waits for the norm", ("norm",)),
    Entry("torch.distributed.checkpoint.filesystem", "pickle", "runs no code that a checkpoint's .metadata holds"),
    Entry(
        "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner",
        "load_bytes",
        "reads plain values, and runs no code that a file holds",
        ("read_item, value",),
    ),
    Entry(ENGINE, "load", "reads tensors, and runs no code that a file holds", ("path, map_location",)),
    Entry(ZERO, "_update_model_bit16_weights", "keeps the views that there are", ("group_index",)),
    Entry(ZERO, "scaled_global_norm", "computes the norm in one launch, on the GPU", ("norm_type",)),
    Entry("bitsandbytes.nn.modules", "quant_state", "says how packed values in a buffer are read"),
]  # fmt: skip


def replace(owner: Any, name: str, new: Any) -> Any:
    """Set `owner.name` (of a module, a class or an instance) to `new`; what was there before is returned.

    Raises UpstreamChanged where the name is gone, or a function's arguments are not those that were tested.
    """
    check(entry_of(owner, name), owner)
    before = getattr(owner, name, None)
    setattr(owner, name, new)
    return before


def set_read(thing: Any, owner: str, name: str, value: Any) -> None:
    """Set `thing.name`, an attribute that the module `owner` looks for. Raises UpstreamChanged if it no longer does."""
    entry = next(entry for entry in ENTRIES if entry[:2] == (owner, name))
    check(entry, resolve(owner))
    setattr(thing, name, value)


def overrides(cls: type) -> type:
    """Class decorator: what `cls`, or a base of ours, overrides of a library is there to be overridden.

    Raises UpstreamChanged as `replace` does, and TypeError for an overridden method that ENTRIES lacks.
    """
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in TESTED]
    owners = {path_of(base) for base in bases}
    entries = {entry.name: entry for entry in ENTRIES if entry.owner in owners}
    ours = {name: value for base in cls.__mro__ if base not in bases for name, value in vars(base).items()}
    for name, value in ours.items():
        if name in entries:
            check(entries[name], bases[0])
        elif inspect.isfunction(value) and not name.endswith("__") and any(name in vars(base) for base in bases):
            raise TypeError(f"{cls.__qualname__}.{name} overrides a library's method: add it to upstream.ENTRIES")
    return cls


def entry_of(owner: Any, name: str) -> Entry:
    """The entry that covers `owner.name`. Raises TypeError where there is none."""
    if isinstance(owner, ModuleType):
        owners = [owner.__name__]
    else:
        owners = list(map(path_of, (owner if isinstance(owner, type) else type(owner)).__mro__))
    for entry in ENTRIES:
        if entry.name == name and entry.owner in owners:
            return entry
    raise TypeError(f"{owners[0]}.{name} is replaced: add it to upstream.ENTRIES")


def path_of(cls: type) -> str:
    """Module and name, as `transformers.trainer.Trainer`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a model or a layer, under either name; None without one."""
    return next((arguments[name] for name in CACHE if arguments.get(name) is not None), None)


def check(entry: Entry, owner: Any) -> None:
    """Raise UpstreamChanged where `owner` lacks the entry's name, or its arguments are none of those tested."""
    if not hasattr(owner, entry.name) and not is_in_source(entry):
        raise UpstreamChanged(f"{entry.owner}.{entry.name} is gone. {versions(entry.library)}")
    if entry.arguments:
        found = arguments_of(getattr(owner, entry.name))
        if found not in entry.arguments:
            raise UpstreamChanged(
                f"{entry.owner}.{entry.name} takes ({found}), expected ({') or ('.join(entry.arguments)}). "
                f"{versions(entry.library)}"
            )
    warn_if_untested(entry.library)


@cache
def is_in_source(entry: Entry) -> bool:
    """Whether the owner's source has the name: of an attribute that the library sets later, or only reads."""
    try:
        owner = resolve(entry.owner)
    except (ImportError, AttributeError):
        return False
    return re.search(rf"\b{entry.name}\b", inspect.getsource(owner)) is not None


def resolve(path: str) -> ModuleType | type:
    """The module or class at a dotted path. Raises ImportError or AttributeError where there is none."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(resolve(module), name) if module else import_module(path)


def arguments_of(function: Any) -> str:
    """Names of a function's arguments, as `model, *args, **kwargs`; without `self`."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(stars.get(each.kind, "") + each.name for each in parameters if each.name != "self")


def versions(library: str) -> str:
    """What is installed, what was tested, and what to do."""
    return (
        f"Installed is {library} {version(library)}, tested was {' and '.join(TESTED[library])}: "
        "pip install -r requirements.txt, or raise the pin as CONTRIBUTING.md says"
    )


@cache
def warn_if_untested(library: str) -> None:
    """One warning for each library whose installed version is not a tested one."""
    if version(library).partition("+")[0] not in TESTED[library]:
        warnings.warn(versions(library), stacklevel=4)
