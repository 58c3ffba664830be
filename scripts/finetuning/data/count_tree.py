"""The counts 0..N as a model would write them: answers around a number, and their tokens as a tree.

Counts share their first digits, and what ends a number follows every one of them: "2", "23" and "24" need the logits
after "", "2", "23" and "24". Each of these places is a node, computed once, however a tokenizer cuts numbers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class AnswerForm:
    """The text around the number in an answer: "There are " and " people."."""

    before: str
    after: str

    def fill_in(self, count: int) -> str:
        """The answer that says `count`."""
        return f"{self.before}{count}{self.after}"

    def read(self, answer: str) -> int | None:
        """The count that an answer of this form says; None for any other answer."""
        digits = answer.removeprefix(self.before).removesuffix(self.after)
        stated = digits.isascii() and digits.isdigit() and answer == self.fill_in(int(digits))
        return int(digits) if stated else None


def answer_form(answer: str, count: int) -> AnswerForm | None:
    """How an answer states `count` in digits; None when it does not, or not exactly once."""
    before, digits, after = answer.partition(str(count))
    touches = before[-1:].isdigit() or after[:1].isdigit()
    return AnswerForm(before, after) if digits and not touches and digits not in after else None


def learn_forms(questions: Sequence[str], answers: Sequence[str], counts: Sequence[int]) -> dict[str, AnswerForm]:
    """The most frequent form of each question's answers, and of all of them under "".

    Questions whose answers state no number in digits are left out: they are no counting questions.
    """
    found: dict[str, Counter[AnswerForm]] = {}
    for question, answer, count in zip(questions, answers, counts, strict=True):
        if form := answer_form(answer, count):
            found.setdefault(question, Counter())[form] += 1
    if not found:
        return {}
    everything = sum(found.values(), Counter())
    return {question: forms.most_common(1)[0][0] for question, forms in [("", everything), *found.items()]}


@dataclass(frozen=True)
class CountTree:
    """Token sequences of all candidate counts as one tree below a prompt.

    - `tokens`: (nodes,) token of each node, parents before children
    - `depths`: (nodes,) 0 for those that follow the prompt directly
    - `sees`: (nodes, nodes) bool, what a node may attend to: itself and what leads to it
    - `places`: (counts, steps) where each token of a count is predicted: 0 is the prompt's end, i + 1 is node i
    - `targets`: (counts, steps) that token; `real`: (counts, steps) bool, False where a count has fewer tokens
    """

    tokens: Tensor
    depths: Tensor
    sees: Tensor
    places: Tensor
    targets: Tensor
    real: Tensor

    @property
    def num_counts(self) -> int:
        """How many counts have a path."""
        return len(self.places)


def build_tree(sequences: Sequence[Sequence[int]]) -> CountTree:
    """The tree of one token sequence per count, each up to the token that ends its number."""
    nodes: dict[tuple[int, ...], int] = {}
    for sequence in sequences:
        for length in range(1, len(sequence)):
            nodes.setdefault(tuple(sequence[:length]), len(nodes))
    sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for path, node in nodes.items():
        sees[node, [nodes[path[:length]] for length in range(1, len(path) + 1)]] = True
    steps = max(map(len, sequences))
    places = torch.zeros(len(sequences), steps, dtype=torch.long)
    targets, real = torch.zeros_like(places), torch.zeros_like(places, dtype=torch.bool)
    for count, sequence in enumerate(sequences):
        for step, token in enumerate(sequence):
            places[count, step] = nodes[tuple(sequence[:step])] + 1 if step else 0
            targets[count, step], real[count, step] = token, True
    return CountTree(
        tokens=torch.tensor([path[-1] for path in nodes], dtype=torch.long),
        depths=torch.tensor([len(path) - 1 for path in nodes], dtype=torch.long),
        sees=sees,
        places=places,
        targets=targets,
        real=real,
    )


def sum_over_tree(logits: Tensor, tree: CountTree) -> Tensor:
    """(rows, 1 + nodes, vocabulary) logits behind the prompt and each node -> (rows, counts) log-likelihoods, in fp32."""
    rows = len(logits)
    return sum_over_paths(
        logits, *(part.to(logits.device).expand(rows, -1, -1) for part in (tree.places, tree.targets, tree.real))
    )


def count_sequences(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    form: AnswerForm,
    largest: int,
) -> list[list[int]]:
    """Tokens of the answers with 0 to `largest` to `messages`, each up to the first token past the number.

    The whole dialogue is tokenized as in training and the prompt's tokens taken off. ValueError where a tokenizer does
    not keep the prompt's tokens when an answer follows.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    prompt = processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    dialogues = [
        processing_class.apply_chat_template(
            [*messages, {"role": "assistant", "content": form.fill_in(count)}], tokenize=False
        )
        for count in range(largest + 1)
    ]
    begin = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    sequences = []
    for count, tokens in enumerate(tokenizer(dialogues, add_special_tokens=False)["input_ids"]):
        if tokens[: len(begin)] != begin:
            raise ValueError(f"the tokens of the prompt {prompt!r:.80} change where {form.fill_in(count)!r} follows it")
        answer = tokens[len(begin) :]
        sequences.append(answer[: _end_of_number(tokenizer, answer, len(f"{form.before}{count}".strip()))])
    return sequences


def _end_of_number(tokenizer: PreTrainedTokenizerBase, answer: list[int], length: int) -> int:
    """How many tokens of an answer it takes until its text is longer than `length` characters, or ends."""
    for end in range(1, len(answer)):
        if len(tokenizer.decode(answer[:end]).strip()) > length or answer[end - 1] == tokenizer.eos_token_id:
            return end
    return len(answer)


def sum_over_paths(logits: Tensor, places: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """(rows, 1 + nodes, vocabulary) logits behind the prompt and each node -> (rows, counts) log-likelihoods, in fp32.

    `places`, `targets` and `real` are (rows, counts, steps), as `CountTree` says.
    """
    logits = logits.float()
    row = torch.arange(len(logits), device=logits.device)[:, None, None]
    log_probs = logits[row, places, targets] - logits.logsumexp(-1)[row, places]
    return log_probs.masked_fill(~real, 0.0).sum(-1)


class TreeCache:
    """The tree of all counts behind each question with a known form of answer, made once."""

    def __init__(
        self,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        forms: dict[str, AnswerForm],
        largest: int,
    ):
        self.processing_class, self.forms, self.largest = processing_class, forms, largest
        self.trees: dict[str, CountTree] = {}

    def tree(self, question: str) -> CountTree | None:
        """The tree behind a question; None where the form of its answers is not known."""
        form = self.forms.get(question)
        if form is None:
            return None
        if question not in self.trees:
            messages = [{"role": "user", "content": question}]
            self.trees[question] = build_tree(count_sequences(self.processing_class, messages, form, self.largest))
        return self.trees[question]
