"""FSDP2: which modules it wraps, what it reduces in fp32, and how its checkpoints are read."""

import io
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from finetuning import upstream
from finetuning.models.parts import base_model_of, frozen_tower_of

# What describes a sharded checkpoint (its `.metadata`), by module. PyTorch pickles it.
DESCRIBES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


def set_up_fsdp2(model: nn.Module) -> None:
    """What PyTorch's FSDP2 wraps, and how it reads checkpoints, before the Trainer exists; changes `model` in place."""
    set_wrap_classes(model)
    read_tensors_only()


def set_wrap_classes(model: nn.Module) -> None:
    """Let FSDP2 wrap each decoder layer, and all layers of a frozen vision tower at once; changes `model` in place.

    FSDP2 shards and all-gathers what it wraps as one unit, found by class names in `_no_split_modules`. A frozen tower
    runs once a step, and each unit costs milliseconds of host time. (The tower itself as a unit would lose the hidden
    states that transformers returns beside its output.)
    """
    base = base_model_of(model)
    tower = frozen_tower_of(model)
    in_tower = set() if tower is None else set(tower.modules())
    wrapped = {
        type(module).__name__
        for module in base.modules()
        if module not in in_tower and any(cls.__name__ in base._no_split_modules for cls in type(module).__mro__)
    }
    holders = (module for module in in_tower if any(isinstance(child, nn.ModuleList) for child in module.children()))
    upstream.replace(base, "_no_split_modules", sorted(wrapped | {type(holder).__name__ for holder in holders}))


def keep_fp32_reductions(plugin: Any, *, quantised: bool) -> None:
    """Average gradients and the loss in fp32, as DDP does; cast no 4-bit weight. Edits accelerate's `plugin`.

    accelerate reduces and casts in the run's 16 bits. In bf16 about 0.1 % of the byte pairs of a 4-bit weight are NaN,
    and arrive as 7FFF, which is another weight (bitsandbytes#1945, pytorch#159333). Preflight therefore demands that
    4-bit weights are stored as fp32, and a `quantised` model is sent without a cast.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        param_dtype = None if quantised else policy.param_dtype
        exact = replace(policy, param_dtype=param_dtype, reduce_dtype=torch.float32, output_dtype=None)
        upstream.replace(plugin, "mixed_precision_policy", exact)


def read_tensors_only() -> None:
    """Let PyTorch read sharded checkpoints without running what is pickled in them: their description, and bytes in them."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    upstream.replace(filesystem, "pickle", SimpleNamespace(load=load_description, dump=pickle.dump))
    upstream.replace(DefaultLoadPlanner, "load_bytes", load_bytes_as_values)


def load_description(file: io.BufferedIOBase) -> Any:
    """`pickle.load` of a `.metadata` that builds nothing but what describes a checkpoint. Raises ValueError for more."""
    return _DescriptionReader(file).load()


class _DescriptionReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type_of_numbers = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in DESCRIBES.get(module, ()) and not is_type_of_numbers:
            raise ValueError(
                f"a checkpoint's .metadata holds {module}.{name}, which describes no tensor and could run code: continue "
                "from another checkpoint, or begin anew"
            )
        return super().find_class(module, name)


def load_bytes_as_values(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes` with `weights_only`: learning rates and the like are plain values."""
    from torch.distributed.checkpoint._traverse import set_element

    loaded, name = torch.load(value, weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
