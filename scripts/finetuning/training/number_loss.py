"""Numbers are near each other: a loss beside cross entropy that says by how many people an answer is wrong.

`crps` is the continuous ranked probability score of the model's own distribution over the counts 0..N (Gneiting and
Raftery 2007): a proper score, in people, exact in place value. `ntl` is the number token loss (Zausinger et al. 2025,
NTL-WAS): the expected distance of a digit from the right one. It needs no candidates, but is blind to place: 33 for 23
costs what 24 costs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.arguments import ScriptArguments
from finetuning.data.count_tree import learn_forms, sum_over_paths
from finetuning.data.number_targets import CountTrees, NumberPlaces, append_trees, number_values
from finetuning.inference.count_distribution import largest_candidate


def ranked_probability_score(log_likelihoods: Tensor, counts: Tensor) -> Tensor:
    """Mean of sum over k of (P(count <= k) - [truth <= k])^2, in people.

    `log_likelihoods` (rows, candidates), which are normalised here; `counts` (rows,), -1 for rows that do not take part.
    """
    reached = log_likelihoods.softmax(-1).cumsum(-1)
    truth = counts[:, None] <= torch.arange(reached.shape[-1], device=reached.device)
    takes_part = counts >= 0
    scores = (reached - truth.to(reached.dtype)).square().sum(-1)
    return (scores * takes_part).sum() / takes_part.sum().clamp(min=1)


def number_token_loss(logits: Tensor, numbers: Tensor, truth: Tensor) -> Tensor:
    """Mean expected distance between the number that a token writes and the right one; 0 without any.

    `logits` (positions, tokens) of those tokens of the vocabulary that write a number, `numbers` (tokens,) which; `truth`
    (positions,). Probabilities are over these tokens alone.
    """
    distances = (numbers - truth[:, None]).abs()
    return (logits.softmax(-1) * distances).sum() / max(len(truth), 1)


class NumberLoss:
    """`number_loss` of a recipe: what it needs of a batch (`collate`), and its value for the trainer (`forward`)."""

    def __init__(self, weight: float, collate: Callable[[Any], Any], values: Tensor | None = None):
        """`values` as `number_values` has them, for `ntl`; None for `crps`."""
        self.weight, self.collate = weight, collate
        self.tokens = None if values is None else values.isfinite().nonzero().flatten()
        self.numbers = None if values is None else values[self.tokens]

    def forward(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], targets: dict[str, Tensor]
    ) -> tuple[Any, Tensor]:
        """(the model's outputs for `inputs`, the loss over numbers); `targets` are the batch's `numbers`."""
        if self.tokens is None or self.numbers is None:
            inputs, places = append_trees(inputs, targets)
            others = places[:, 1:].flatten()
            outputs = model(**inputs, logit_rows=places, other_rows=others, use_cache=False, fused_lm_head=True)
            paths = (targets["places"], targets["targets"], targets["real"])
            likelihoods = sum_over_paths(outputs.logits, *paths)
            # Candidates that only other rows of the batch have.
            likelihoods = likelihoods.masked_fill(~targets["real"].any(-1), torch.finfo(likelihoods.dtype).min)
            return outputs, ranked_probability_score(likelihoods, targets["counts"])
        outputs = model(**inputs, logit_rows=targets["logit_rows"], use_cache=False, fused_lm_head=True)
        self.tokens, self.numbers = self.tokens.to(outputs.logits.device), self.numbers.to(outputs.logits.device)
        return outputs, number_token_loss(outputs.logits[:, self.tokens], self.numbers, targets["values"])


def outputs_and_number_loss(
    model: torch.nn.Module, inputs: dict[str, Tensor], loss: NumberLoss | None, targets: dict[str, Tensor] | None
) -> tuple[Any, Tensor]:
    """The model's outputs for a training batch, and the loss over numbers: 0 where none is asked for or none is stated."""
    if loss is not None and targets is not None:
        return loss.forward(model, inputs, targets)
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    return outputs, torch.zeros_like(outputs.loss)


def make_number_loss(
    script_args: ScriptArguments,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    train_questions: Sequence[dict[str, Any]] = (),
) -> NumberLoss | None:
    """The recipe's number loss; None where it asks for none.

    `train_questions` are the counting questions of the train split, as the exam has them. ValueError where `crps` is asked
    for and no answer states a count in digits.
    """
    if script_args.number_loss is None:
        return None
    if script_args.number_loss == "ntl":
        values = number_values(getattr(processing_class, "tokenizer", processing_class))
        return NumberLoss(script_args.number_loss_weight, lambda collate: NumberPlaces(collate, values), values)
    forms = learn_forms(
        *([question[key] for question in train_questions] for key in ("question", "reference", "count"))
    )
    if not forms:
        raise ValueError(
            "number_loss: crps needs answers that state a count in digits, and none of the train split's does: remove it "
            "from the recipe, or set number_loss: ntl"
        )
    largest = largest_candidate([question["count"] for question in train_questions])
    return NumberLoss(
        script_args.number_loss_weight, lambda collate: CountTrees(collate, processing_class, forms, largest)
    )
