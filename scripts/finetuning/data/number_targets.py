"""What a loss over numbers needs of a batch: where numbers are answered, or the tokens of all counts behind a question."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DataCollator, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.collator import leading_marks, next_labels
from finetuning.data.count_tree import AnswerForm, CountTree, TreeCache


def number_values(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(vocabulary,) fp32: the number that a token writes in ASCII digits ("7", in some tokenizers "142"), NaN for others."""
    values = torch.full((len(tokenizer),), torch.nan)
    for token, number in tokenizer.get_vocab().items():
        digits = token.lstrip("▁Ġ")  # how BPE and SentencePiece write a space
        if digits.isascii() and digits.isdigit():
            values[number] = int(digits)
    return values


class NumberPlaces:
    """A collator's batch, and `numbers`: `logit_rows`, the positions in the flattened (rows * tokens) that predict digits,
    and `values` (of these positions), the number that the right token writes."""

    def __init__(self, collate: DataCollator, values: Tensor):
        self.collate, self.values = collate, values

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        labels = next_labels(batch["labels"])
        values = self.values[labels.clamp(min=0)].masked_fill(labels == -100, torch.nan)
        places = values.isfinite().nonzero().flatten()
        batch["numbers"] = {"logit_rows": places, "values": values[places]}
        return batch


class CountTrees:
    """A collator's batch, and `numbers`: each row's question answered with every count 0..`largest`, as a tree.

    Of a row whose only answer states a count in the form that its question's answers have (`learn_forms`), else of none.
    With n nodes, c counts and s steps, padded to the largest tree of the batch (`CountTree` says what they hold):

    - `tokens`, `depths`: (rows, n); `sees`: (rows, n, n)
    - `places`, `targets`, `real`: (rows, c, s)
    - `ends`: (rows,) the prompt's last token; `counts`: (rows,) the true count, -1 for a row without
    """

    def __init__(
        self,
        collate: DataCollator,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        forms: dict[str, AnswerForm],
        largest: int,
    ):
        self.collate = collate
        self.trees = TreeCache(processing_class, forms, largest)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        found = [
            self.tree_of(example["messages"], tokens, labels)
            for example, tokens, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True)
        ]
        if any(found):
            batch["numbers"] = stack_trees(found)
        return batch

    def tree_of(
        self, messages: list[dict[str, Any]], tokens: Tensor, labels: Tensor
    ) -> tuple[CountTree, int, int] | None:
        """(tree, place of the prompt's last token, count) of one row (tokens,); None where it states no count."""
        *_, question, answer = messages
        if [message["role"] for message in messages].count("assistant") != 1:
            return None
        text = leading_marks(question)[1]
        tree = self.trees.tree(text)
        count = None if tree is None else self.trees.forms[text].read(answer["content"])
        if count is None or count >= tree.num_counts or not (labels != -100).any():
            return None
        end = int((labels != -100).nonzero()[0]) - 1
        stated = tree.targets[count][tree.real[count]]
        return (tree, end, count) if torch.equal(tokens[end + 1 : end + 1 + len(stated)], stated) else None


def stack_trees(found: Sequence[tuple[CountTree, int, int] | None]) -> dict[str, Tensor]:
    """(tree, prompt's end, count) of each row, or None -> the tensors that `CountTrees` names."""
    trees = [item[0] for item in found if item]
    nodes = max(len(tree.tokens) for tree in trees)
    counts, steps = (max(tree.places.shape[axis] for tree in trees) for axis in (0, 1))
    stacked = {
        "tokens": torch.zeros(len(found), nodes, dtype=torch.long),
        "depths": torch.zeros(len(found), nodes, dtype=torch.long),
        "sees": torch.eye(nodes, dtype=torch.bool).repeat(len(found), 1, 1),
        "places": torch.zeros(len(found), counts, steps, dtype=torch.long),
        "targets": torch.zeros(len(found), counts, steps, dtype=torch.long),
        "real": torch.zeros(len(found), counts, steps, dtype=torch.bool),
    }
    for row, item in enumerate(found):
        for name, values in stacked.items() if item else ():
            given = getattr(item[0], name)
            values[row][tuple(slice(size) for size in given.shape)] = given
    stacked["ends"] = torch.tensor([item[1] if item else 0 for item in found])
    stacked["counts"] = torch.tensor([item[2] if item else -1 for item in found])
    return stacked


def append_trees(inputs: dict[str, Tensor], trees: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A right-padded batch with each row's nodes behind it, and where their logits are.

    Returns inputs of (rows, tokens + nodes) with a mask (rows, 1, tokens + nodes, tokens + nodes), in which a node sees the
    prompt and what leads to it, and nothing sees a node; and (rows, 1 + nodes) positions in the flattened batch: the
    prompt's end and the nodes. Nothing here waits for a GPU.
    """
    tokens = inputs["input_ids"]
    rows, length = tokens.shape
    nodes = trees["tokens"].shape[1]
    width, places = length + nodes, torch.arange(length, device=tokens.device)
    before_end = places <= trees["ends"][:, None]
    mask = torch.zeros(rows, 1, width, width, dtype=torch.bool, device=tokens.device)
    mask[:, :, :length, :length] = places[:, None] >= places
    mask[:, 0, length:, :length] = before_end[:, None]
    mask[:, 0, length:, length:] = trees["sees"]
    firsts = torch.arange(rows, device=tokens.device)[:, None] * width
    behind = length + torch.arange(nodes, device=tokens.device)
    named = inputs["supervised_rows"]
    joined = inputs | {
        "input_ids": torch.cat([tokens, trees["tokens"]], dim=1),
        "labels": F.pad(inputs["labels"], (0, nodes), value=-100),
        "attention_mask": mask,
        "position_ids": torch.cat([places.expand(rows, -1), trees["ends"][:, None] + 1 + trees["depths"]], dim=1),
        "supervised_rows": named + named // length * nodes,
    }
    return joined, firsts + torch.cat([trees["ends"][:, None], behind.expand(rows, -1)], dim=1)
