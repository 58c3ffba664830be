"""`init_lora_weights: eva` (arXiv 2410.07170): A begins as the main directions of what its layer reads in rows of the run.

B begins at zero, so that the model begins as it was. PEFT also moves ranks between layers, and passes over the rows until
every direction has settled, however long that takes. Here each layer keeps its rank, which fused layers, plans and other
readers of the adapter count on, and so many rows are read once.
"""

from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, send_to_device
from datasets import Dataset
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.label_audit import collate, undecoded
from finetuning.models.parts import base_model_of

ROWS, ROWS_AT_ONCE = 32, 4


class InputDirections:
    """The main directions (rank, in) of the input of each adapted layer; layers that read the same tensor share them."""

    def __init__(self, model: PeftModel):
        """Watches the adapted layers of `model` until `end`."""
        self.directions: dict[str, IncrementalPCA] = {}
        self.mask: Tensor | None = None  # (rows, tokens): where a token is no padding
        self.last: tuple[Tensor | None, str] = None, ""
        self.same_as: dict[str, str] = {}
        self.hooks = [
            module.register_forward_pre_hook(partial(self.read, name))
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        ]

    def read(self, name: str, layer: LoraLayer, inputs: tuple) -> None:
        """Forward pre-hook: another batch of the layer's input."""
        x = inputs[0]
        if x is self.last[0]:
            self.same_as[name] = self.last[1]
            return
        self.last = x, name
        is_text = self.mask is not None and x.shape[:-1] == self.mask.shape
        flat = (x[self.mask] if is_text else x.flatten(0, -2)).float()
        rank = next(iter(layer.r.values()))
        if rank > min(flat.shape):
            raise ValueError(
                f"init_lora_weights: eva: lora_r: {rank}, but {name} reads {len(flat)} vectors of {flat.shape[1]} numbers at "
                "once: set a smaller lora_r, or remove init_lora_weights"
            )
        if name not in self.directions:
            self.directions[name] = IncrementalPCA(rank, lowrank=2 * rank <= min(flat.shape), lowrank_seed=0)
        self.directions[name].partial_fit(flat)

    def end(self) -> dict[str, Tensor]:
        """Name of each layer -> its directions, unit vectors, by how much of the input they explain."""
        for hook in self.hooks:
            hook.remove()
        names = {name: name for name in self.directions} | self.same_as
        return {name: self.directions[same].components_.float() for name, same in names.items()}


@torch.no_grad()
def begin_from_inputs(
    model: PeftModel, rows: Dataset, processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> None:
    """Set every A of `model` in place, whose adapters were just made. All processes take the main one's.

    Raises ValueError for a rank that is larger than a layer's input.
    """
    device = PartialState().device
    model.to(device)
    number, was_training = min(ROWS, len(rows)), model.training
    sample = undecoded(rows, [index * len(rows) // number for index in range(number)])
    watched, inner = InputDirections(model.eval()), base_model_of(model).model  # without the head: no logits are needed
    starts = tqdm(range(0, number, ROWS_AT_ONCE), desc="Directions of the rows (EVA)", disable=None)
    for start in starts:
        batch = collate(processing_class, sample[start : start + ROWS_AT_ONCE])
        batch.pop("labels")
        watched.mask = batch["attention_mask"].bool().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            inner(**send_to_device(batch, device), use_cache=False)
    directions = broadcast(watched.end())
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    initialize_lora_eva_weights(model, eva_state_dict=directions, show_progress_bar=False)
    # What is saved is plain LoRA: a reader has nothing to begin.
    config.init_lora_weights, config.eva_config = True, None
    model.train(was_training)
