"""Starts of LoRA that take directions out of the base: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

    W = (W - s B0 A0) + s B0 A0

The bracket is frozen in the base's place, B0 A0 is trained: PiSSA's are the largest singular values, OLoRA's the first rows of
a QR decomposition. A trained adapter is right for that bracket only. A finished run's file is therefore written against the
base itself, as W + s (B A - B0 A0): twice the rank, for any program that loads LoRA.
"""

import json
import math
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetuning.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

CHANGES_BASE = ("pissa", "olora")  # what the names of such starts begin with


def changes_base(start: str | None) -> bool:
    """Whether `init_lora_weights: start` takes something out of the base."""
    return start is not None and start.startswith(CHANGES_BASE)


def adapter_of(model: PeftModel) -> dict[str, Tensor]:
    """A copy of A and B of every adapted layer, on the CPU, by their names in a saved file."""
    return {
        name.replace(".default.", "."): parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def write_against_base(folder: Path, start: dict[str, Tensor]) -> None:
    """Rewrite the adapter of `folder`, trained from `start`, so that it is right for the base as it is published."""
    state = load_file(folder / ADAPTER_WEIGHTS)
    for name, first in start.items():
        last = state[name]
        joined = [last, first] if ".lora_A." in name else [last, -first]
        state[name] = torch.cat([part.to(last.dtype) for part in joined], dim=0 if ".lora_A." in name else 1)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2  # the same scale s
    config["init_lora_weights"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
