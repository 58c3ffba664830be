"""How likely a model finds every count 0..N as the answer to a counting question, from one pass over the prompt.

A greedy answer is one string, and throws away what the model knows of the other counts: of single digits the most likely
string is not even always the most likely number. Here the prompt, picture included, is computed once; the candidates
are short branches behind its keys and values, digits that they share computed once (`data.count_tree`). The median of
the distribution has the least expected absolute error (Lukasik et al. 2024, regression-aware inference with LLMs).
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.collator import leading_marks, prompt_batch
from finetuning.data.count_tree import AnswerForm, CountTree, TreeCache, sum_over_tree
from finetuning.inference.generation import LIKELIHOODS, answer_rows, packs

SMALLEST_RANGE = 20
ROWS_AT_ONCE = 16  # where the batch size is `auto`


def largest_candidate(train_counts: Sequence[int]) -> int:
    """The N of the candidates 0..N: half as many again as the largest count that training showed."""
    return max(SMALLEST_RANGE, -(-3 * max(train_counts, default=0) // 2))


def tree_log_likelihoods(model: PreTrainedModel, inputs: dict[str, Tensor], tree: CountTree) -> Tensor:
    """(rows, counts) fp32: log-likelihood of each count's tokens behind left-padded prompts, its number's end included.

    `inputs` are `input_ids` and `attention_mask` of shape (rows, tokens), and `pixel_values` for a vision model.
    """
    mask = inputs["attention_mask"]
    rows, length = mask.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    logits = prompt.logits
    if len(tree.tokens):
        sees = torch.cat(
            [
                mask.bool()[:, None].expand(rows, len(tree.tokens), length),
                tree.sees.to(mask.device).expand(rows, -1, -1),
            ],
            dim=-1,
        )
        hidden = torch.zeros(sees.shape, dtype=logits.dtype, device=mask.device)
        hidden.masked_fill_(~sees, torch.finfo(logits.dtype).min)
        branches = model(
            input_ids=tree.tokens.to(mask.device).expand(rows, -1),
            attention_mask=hidden[:, None],
            position_ids=positions[:, -1:] + 1 + tree.depths.to(mask.device),
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        logits = torch.cat([logits, branches.logits], dim=1)
    return sum_over_tree(logits, tree)


class CountReader:
    """Log-likelihoods of the counts 0..`largest` for rows whose question has a known form of answer.

    `forms` are `learn_forms` of the training answers; a question that training never asked is no counting question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        forms: dict[str, AnswerForm],
        largest: int,
    ):
        self.model, self.processing_class = model, processing_class
        self.trees = TreeCache(processing_class, forms, largest)

    def trees_of(self, rows: Sequence[dict[str, Any]]) -> dict[int, CountTree]:
        """The tree of each row that asks for a count, by the row's number; no picture is opened where that can be helped."""
        # A Dataset would decode the pictures with the rows.
        messages = rows["messages"] if isinstance(rows, Dataset) else [row["messages"] for row in rows]
        trees = ((number, self.trees.tree(leading_marks(turns[-1])[1])) for number, turns in enumerate(messages))
        return {number: tree for number, tree in trees if tree is not None}

    @torch.no_grad()
    def read_batch(self, rows: Sequence[dict[str, Any]]) -> list[list[float] | None]:
        """One list of `largest + 1` log-likelihoods per row, or None for a question that asks for no count."""
        results: list[list[float] | None] = [None] * len(rows)
        by_tree: dict[int, tuple[CountTree, list[int]]] = {}
        for index, row in enumerate(rows):
            tree = self.trees.tree(leading_marks(row["messages"][-1])[1])
            if tree is not None:
                by_tree.setdefault(id(tree), (tree, []))[1].append(index)
        for tree, indices in by_tree.values():
            inputs = prompt_batch(self.processing_class, [rows[index] for index in indices]).to(self.model.device)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            for index, values in zip(indices, tree_log_likelihoods(self.model, inputs, tree).tolist(), strict=True):
                results[index] = values
        return results


def read_counts(
    reader: CountReader, rows: Sequence[dict[str, Any]], *, batch_size: int | str, description: str = "Counting"
) -> list[list[float] | None]:
    """Log-likelihoods of the counts for all rows, in order, on every process; None for a row that asks for no count.

    The rows are dealt out over the processes.
    """
    if not packs(reader.model):
        return read_by_transformers(reader, rows, batch_size=batch_size, description=description)
    windows = answer_rows(
        *(reader.model, reader.processing_class, rows),
        max_new_tokens=1,
        batch_size=batch_size,
        trees=reader.trees_of(rows),
        description=description,
    )
    return [likelihoods for window in windows for likelihoods in window[LIKELIHOODS]]


def read_by_transformers(
    reader: CountReader, rows: Sequence[dict[str, Any]], *, batch_size: int | str, description: str
) -> list[list[float] | None]:
    """The same by `CountReader.read_batch`, for decoders that the packed path does not know."""
    state = PartialState()
    order = sorted(range(len(rows)), key=lambda index: leading_marks(rows[index]["messages"][-1])[1])
    size = ROWS_AT_ONCE if batch_size == "auto" else int(batch_size)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[state.process_index :: state.num_processes]
    was_training = reader.model.training
    reader.model.eval()
    found: list[tuple[int, list[float] | None]] = []
    for indices in tqdm(mine, desc=description, unit="batch", disable=not state.is_main_process, leave=False):
        found += zip(indices, reader.read_batch([rows[index] for index in indices]), strict=True)
    reader.model.train(was_training)
    return [values for _, values in sorted(gather_object(found))]
