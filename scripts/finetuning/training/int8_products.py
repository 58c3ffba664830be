"""Which products stay in 16 bits under `base_precision: int8`: measured on rows of the run, before it starts.

The measure is the divergence of the next-token distributions, KL(16 bits || INT8), in shares of the loss: what INT8 adds to
the loss of text that the model itself would write. One product alone in INT8 says what it adds; they add up nearly.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.label_audit import IGNORED, collate, undecoded
from finetuning.kernels.int8_base import frozen_linears, hold_base_in_int8, int8_linear_of, stack_name
from finetuning.models.parts import decoder_layers
from finetuning.run_folder import checkpoints, read_int8_products, write_int8_products

MOST_OF_LOSS = 0.005  # that INT8 may add
ROWS, TOKENS = 8, 512  # that are asked


def hold_in_int8(
    model: nn.Module, folder: Path, rows: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> tuple[int, str]:
    """Quantise `model`'s base in place; how many layers, and a sentence on what it costs.

    A run that goes on keeps the products that it was begun with; all processes take the main one's.
    """
    device = PartialState().device
    model.to(device)
    choice = read_int8_products(folder) if checkpoints(folder) else None
    if choice is None:
        number = min(ROWS, len(rows))
        sample = undecoded(rows, [index * len(rows) // number for index in range(number)])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # as in training
            choice = choose_products(model, send_to_device(collate(processing_class, sample), device))
        [choice] = broadcast_object_list([choice])
        if PartialState().is_main_process:
            write_int8_products(folder, choice)
    held = hold_base_in_int8(model, choice["in_16_bits"])
    kept = f"; in 16 bits: {', '.join(choice['in_16_bits'])}" if choice["in_16_bits"] else ""
    return held, f"adds {choice['share_of_loss']:.2%} of the loss on {choice['rows']} rows{kept}"


@torch.no_grad()
def choose_products(model: nn.Module, batch: dict[str, Any], most: float = MOST_OF_LOSS) -> dict:
    """`in_16_bits`, the fewest products whose rest adds at most `most` to the loss of `batch`; `share_of_loss`, the rest's.

    `alone` is each product's own share, the largest first, where it had to be asked for. The model is as before.
    """
    was_training = model.training
    model.eval()
    places: dict[str, list] = {}
    for number, layer in enumerate(decoder_layers(model)):
        for parent, name, linear, projection in frozen_linears(layer):
            places.setdefault(stack_name(number, projection), []).append((parent, name, linear))
    loss, reference = loss_and_distributions(model, batch)

    def share(names: list[str]) -> float:
        """What these products in INT8 add."""
        for parent, name, linear in (place for product in names for place in places[product]):
            setattr(parent, name, int8_linear_of(linear))
        found = loss_and_distributions(model, batch)[1]
        for parent, name, linear in (place for product in names for place in places[product]):
            setattr(parent, name, linear)
        divergence = (reference.exp() * (reference - found)).sum(-1).mean()
        return (divergence / loss.clamp(min=1e-6)).item()

    choice = {"in_16_bits": [], "share_of_loss": share(list(places)), "rows": len(batch["input_ids"])}
    if choice["share_of_loss"] > most:
        alone = {name: share([name]) for name in tqdm(places, desc="Asking each product in INT8", disable=None)}
        worst = sorted(alone, key=alone.get, reverse=True)
        kept = 0
        while choice["share_of_loss"] > most and kept < len(worst):
            # As many more as would do if the others' shares added up, one at least.
            excess = choice["share_of_loss"] - most
            while excess > 0 and kept < len(worst):
                excess -= alone[worst[kept]]
                kept += 1
            choice["in_16_bits"], choice["share_of_loss"] = worst[:kept], share(worst[kept:]) if worst[kept:] else 0.0
        choice["alone"] = {name: alone[name] for name in worst}
    model.train(was_training)
    return choice


def loss_and_distributions(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean loss over supervised tokens, at most `TOKENS` of them, and log-probabilities (tokens, vocabulary) in fp32."""
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    some = torch.linspace(0, len(rows) - 1, min(len(rows), TOKENS), device=rows.device).long()
    rows, columns = rows[some], columns[some]
    log_probs = torch.log_softmax(logits[rows, columns].float(), -1)
    return -log_probs.gather(1, labels[rows, columns][:, None]).mean(), log_probs
