"""Fused linear cross entropy on supervised positions only, which the batch names (`supervised_rows`).

TRL's fused LM head finds the positions by boolean masks. The size of a mask's result is known on the GPU only: the host
waits for the whole forward pass, twice, and the GPU then waits for the host. The kernel itself is TRL's.
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

VOCABULARY_CHUNK = 32768  # logits of this many tokens of the vocabulary at a time, as in TRL
# Settings of models whose logits are scaled, or whose loss has more terms: these keep TRL's code.
UNSUPPORTED_SETTINGS = (
    "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "output_router_logits",
)  # fmt: skip


def use_supervised_rows(model: nn.Module) -> None:
    """Let `model(**batch, fused_lm_head=True)` compute logits and loss of the batch's `supervised_rows` only; in place.

    `model` is transformers' (inside PEFT's), after TRL's `add_fused_lm_head`. Without `supervised_rows` TRL's code
    runs. The output's `log_probs`, `entropy`, `is_top1` and `label_mask` are (supervised positions,).
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in UNSUPPORTED_SETTINGS):
        return
    trl_forward = model.forward

    @wraps(trl_forward.__func__)  # `generate` reads the signature
    def forward(self, *args, supervised_rows=None, fused_lm_head=False, labels=None, num_items_in_batch=None, **kwargs):
        if not fused_lm_head or supervised_rows is None:
            return trl_forward(
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
    """All-gather a parameter that FSDP2 sharded; its gradient is averaged over all processes, as FSDP2 does.

    With TRL's `full_tensor()` alone each process would keep the gradient of its own batch for its shard.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda grad: grad / mesh.size())
    return full
