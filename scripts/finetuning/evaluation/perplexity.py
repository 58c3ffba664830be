"""How surprised a model is by given answers: the loss on their tokens, row by row."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetuning.evaluation.answering import AskedModels


class AnswerLoss(NamedTuple):
    """Negative log-likelihood of a row's supervised tokens, in nats, and their number."""

    total: float
    num_tokens: int


def perplexity(losses: Sequence[AnswerLoss]) -> float:
    """exp of the mean loss per token over all rows: 1 for a model that is always certain and right."""
    return math.exp(sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses))


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    batch_size: int,
    description: str = "Measuring the loss",
) -> list[AnswerLoss]:
    """The loss of each conversation on the tokens that training supervises, in order, on every process.

    Logits are built for the answers only: over Gemma's 256,000 words they would otherwise be the largest thing in memory.
    Raises ValueError when a conversation has no supervised token.
    """
    encoded = tokenizer.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masks = encoded["assistant_masks"]
    if empty := [index for index, mask in enumerate(masks) if not any(mask)]:
        raise ValueError(f"rows without an answer to measure: {empty}; each needs an assistant turn with text")
    order = sorted(range(len(masks)), key=lambda index: len(masks[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    state = PartialState()
    losses: list[tuple[int, AnswerLoss]] = []
    mine = batches[state.process_index :: state.num_processes]
    for indices in tqdm(mine, desc=description, unit="batch", disable=not state.is_main_process, leave=False):
        # Padded on the left, the answers stand together at the end, where `logits_to_keep` counts from.
        inputs = tokenizer.pad(
            {"input_ids": [encoded["input_ids"][index] for index in indices]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        width = inputs["input_ids"].shape[1]
        supervised = torch.tensor([[0] * (width - len(masks[index])) + masks[index] for index in indices])
        # The token before an answer predicts its first token.
        num_kept = width - int(supervised.any(0).int().argmax()) + 1
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, logits_to_keep=num_kept, use_cache=False).logits
        targets = inputs["input_ids"].masked_fill(~supervised.bool().to(model.device), -100)[:, -num_kept + 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        for index, total, number in zip(indices, loss.sum(1).tolist(), (targets != -100).sum(1).tolist(), strict=True):
            losses.append((index, AnswerLoss(total, number)))
    return [loss for _, loss in sorted(gather_object(losses))]


def losses_of_both(
    models: AskedModels, questions: Sequence[dict[str, Any]], *, batch_size: int
) -> dict[str, list[AnswerLoss]]:
    """The loss of the reference answers, under the tuned and the base model."""
    conversations = [
        [*question["messages"], {"role": "assistant", "content": question["reference"]}] for question in questions
    ]
    losses = {}
    for name in ("tuned", "base"):
        with models.as_named(name) as model:
            losses[name] = answer_losses(
                *(model, models.processing_class, conversations),
                batch_size=batch_size,
                description=f"Loss of the {name} model",
            )
    return losses
