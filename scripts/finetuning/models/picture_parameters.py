"""Vectors that pictures are laid out with beside the projector (`image_newline` of LLaVA-NeXT and OneVision), in an adapter.

PEFT saves and switches modules; these are bare parameters of the model. In `adapter_model.safetensors` they lie under their
full names, where PEFT's own loader puts them into the base. So whoever answers without the adapter needs the base's back.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetuning.models.parts import PICTURE_PARAMETERS, base_model_of
from finetuning.run_folder import ADAPTER_WEIGHTS


def picture_parameters(model: nn.Module, *, trained: bool = False) -> dict[str, nn.Parameter]:
    """Full name -> the parameter, of those that the model has; or that are `trained`."""
    return {
        name: each
        for name, each in model.named_parameters()
        if name.rpartition(".")[2] in PICTURE_PARAMETERS and (each.requires_grad or not trained)
    }


def add_to_adapter(folder: Path, trained: nn.Module | Mapping[str, Tensor]) -> None:
    """Write the trained ones into the adapter of `folder`, which PEFT saved without them.

    `trained` is the model, or its trained weights by full name where no process holds them all. Not of a model without LoRA.
    """
    if isinstance(trained, nn.Module):
        trained = picture_parameters(trained, trained=True) if isinstance(trained, PeftModel) else {}
    added = {name: weight for name, weight in trained.items() if name.rpartition(".")[2] in PICTURE_PARAMETERS}
    if added:
        state = load_file(folder / ADAPTER_WEIGHTS)
        state |= {name: weight.detach().cpu().contiguous() for name, weight in added.items()}
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """`PeftModel.from_pretrained`, which keeps the base's vectors for `without_adapter`."""
    base = base_model_of(model)
    own = {name: each.detach().clone() for name, each in picture_parameters(base).items()}
    # Without `low_cpu_mem_usage` PEFT first draws every adapter at random, on all cores: 6 s of a 7B, and 200 s of CPU.
    device = next(base.parameters()).device
    model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True, torch_device=str(device))
    model.picture_parameters_of_base = own
    return model


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """`model.disable_adapter()`, with the base's vectors too."""
    own: dict[str, Tensor] = getattr(model, "picture_parameters_of_base", {})
    trained = set_vectors(model, own)
    try:
        with model.disable_adapter():
            yield
    finally:
        set_vectors(model, trained)


@torch.no_grad()
def set_vectors(model: PeftModel, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy them into the base inside of `model`; returns what was there, by the same names."""
    base, before = base_model_of(model), {}
    for name, vector in vectors.items():
        parameter = base.get_parameter(name)
        before[name] = parameter.detach().clone()
        parameter.copy_(vector)
    return before
