"""The loss from supervised positions only, which the batch names: the host never asks the GPU where they are.

TRL's fused LM head finds them by boolean masks, and a mask's result has a size that only the GPU knows: the host waits
for the whole forward pass, twice, and the GPU then for the host. Batches carry `supervised_rows` instead.
"""

from functools import wraps
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from finetuning import upstream
from finetuning.data.collator import next_labels

VOCABULARY_CHUNK = 32768  # logits of so many words at a time, as TRL has it
# Settings of models whose logits or loss are more than a product: TRL's code knows them.
MORE_THAN_A_PRODUCT = (
    "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "output_router_logits",
)  # fmt: skip


def use_supervised_rows(model: nn.Module) -> None:
    """Let `model(**batch, fused_lm_head=True)` follow the batch's `supervised_rows`, in place.

    Call it on the model (inside PEFT's) that TRL's `add_fused_lm_head` has patched; without `supervised_rows` TRL's own
    code runs. The output's `log_probs`, `entropy`, `is_top1` and `label_mask` are 1-D, of the supervised positions.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in MORE_THAN_A_PRODUCT):
        return
    as_trl = model.forward

    @wraps(as_trl.__func__)  # `generate` reads the signature
    def forward(self, *args, supervised_rows=None, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head or supervised_rows is None:
            return as_trl(
                *args, fused_lm_head=fused_lm_head, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs
            )
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, supervised_rows=supervised_rows, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        weight, bias = full_parameter(head.weight), full_parameter(head.bias)
        with maybe_gather_lm_head_ctx(weight, bias):
            log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
                hidden.flatten(0, 1).index_select(0, supervised_rows),
                weight,
                bias,
                next_labels(labels).index_select(0, supervised_rows),
                1.0,
                VOCABULARY_CHUNK,
                getattr(config, "final_logit_softcapping", None),
                1.0,
                ("entropy", "is_top1"),
            )
        count = max(len(log_probs), 1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=torch.ones_like(log_probs, dtype=torch.bool),
        )

    upstream.replace(model, "forward", MethodType(forward, model))


def full_parameter(parameter: nn.Parameter | None) -> Tensor | None:
    """What FSDP2 divides in one piece; its gradient is the mean over all processes, as FSDP2 itself averages.

    TRL's `full_tensor()` alone would leave each process with its own gradient of its part.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full
