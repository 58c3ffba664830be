"""Fused linear cross entropy on supervised positions only, which the batch names (`supervised_rows`).

TRL's fused LM head finds the positions by boolean masks. The size of a mask's result is known on the GPU only: the host
waits for the whole forward pass, twice, and the GPU then waits for the host. The kernel itself is TRL's.
"""

from dataclasses import dataclass
from functools import wraps
from types import MethodType

import torch
import torch.nn.functional as F
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


@dataclass
class SupervisedOutput(FusedCausalLMOutput):
    """TRL's output, and the logits that were asked for."""

    logits: Tensor | None = None


def use_supervised_rows(model: nn.Module) -> None:
    """Let `model(**batch, fused_lm_head=True)` compute logits and loss of the batch's `supervised_rows` only; in place.

    `model` is transformers' (inside PEFT's), after TRL's `add_fused_lm_head`. Without `supervised_rows` TRL's code
    runs. The output's `log_probs`, `entropy`, `is_top1` and `label_mask` are (supervised positions,).

    `logit_rows`, positions of any shape, asks for `logits` of them, too, (*logit_rows.shape, vocabulary). They may name
    supervised positions; others must be in `other_rows` (1-D), each once and none of them supervised.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in UNSUPPORTED_SETTINGS):
        return
    trl_forward = model.forward

    @wraps(trl_forward.__func__)  # `generate` reads the signature
    def forward(
        self, *args, supervised_rows=None, logit_rows=None, other_rows=None, fused_lm_head=False, labels=None,
        num_items_in_batch=None, **kwargs,
    ):  # fmt: skip
        if not fused_lm_head or supervised_rows is None:
            return trl_forward(
                *args, fused_lm_head=fused_lm_head, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs
            )
        kwargs["use_cache"] = False
        needed = supervised_rows if other_rows is None else torch.cat([supervised_rows, other_rows])
        hidden = self.base_model(*args, supervised_rows=needed, **kwargs).last_hidden_state.flatten(0, 1)
        head, softcap, logits = self.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), None
        weight, bias = full_parameter(head.weight), full_parameter(head.bias)
        with maybe_gather_lm_head_ctx(weight, bias):
            log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
                hidden.index_select(0, supervised_rows),
                weight,
                bias,
                next_labels(labels).index_select(0, supervised_rows),
                1.0,
                VOCABULARY_CHUNK,
                softcap,
                1.0,
                ("entropy", "is_top1"),
            )
            if logit_rows is not None:
                logits = F.linear(hidden.index_select(0, logit_rows.flatten()), weight, bias).float()
                logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).unflatten(
                    0, logit_rows.shape
                )
        count = max(len(log_probs), 1) if num_items_in_batch is None else num_items_in_batch
        return SupervisedOutput(
            loss=-log_probs.sum() / count,
            logits=logits,
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
