"""What a model expects next: logits behind a prompt, and behind each of several continuations, in one pass.

A prompt is computed once; every continuation is a branch behind it, and prompts about one image share that too.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.inference.answerer import Answerer, by_length, in_chunks, lay_out
from finetuning.inference.packed_prompts import PackedPrompts, Segment
from finetuning.inference.prompt_reader import (
    PromptGroup,
    PromptReader,
    cut_windows,
    group_rows,
    image_ids_of,
    read_prompts,
)

WINDOW = 240  # rows of a process between two results


def continuation_logits(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    continuations: Sequence[Sequence[int]],
    *,
    keep: Sequence[int] | None = None,
    batch_size: int | str = "auto",
    name: str = "tuned",
    description: str = "Scoring",
) -> Iterator[Tensor]:
    """For each row, in order and on every process, log-probabilities (1 + continuations, vocabulary), fp32 on the CPU.

    The first line is of the token behind the prompt, line i + 1 of the token behind prompt and continuation i (token
    ids, at least one). `keep` chooses columns, by token id. Rows are as for `answer_rows`; `name="base"` switches a
    PeftModel's adapter off. Raises ValueError for models that `packed_decoder.reason_against` names.
    """
    state = PartialState()
    was_training = model.training
    model.eval()
    longest = sum(map(len, continuations))  # slots behind each prompt
    answerer = Answerer(model, processing_class, max_new_tokens=longest, batch_size=batch_size, say=tqdm.write)
    image_ids = image_ids_of(rows)
    windows = cut_windows(image_ids, WINDOW * state.num_processes)
    groups = [group_rows(image_ids, numbers)[state.process_index :: state.num_processes] for numbers in windows]
    tokens = [torch.tensor(list(continuation)) for continuation in continuations]
    columns = None if keep is None else torch.tensor(list(keep), device=answerer.decoder.device)

    def compute(part: Sequence[PromptGroup]) -> dict[int, Tensor]:
        return score_batch(answerer, part, tokens, columns, name)

    bar = tqdm(total=len(rows), desc=description, unit="row", disable=not state.is_main_process, leave=False)
    try:
        for prompts in read_prompts(PromptReader(processing_class, rows, model.dtype), groups):
            scores: dict[int, Tensor] = {}
            for batch in answerer.batches(prompts):
                new = answerer.fit(batch, compute)
                scores |= new
                bar.update(min(len(new) * state.num_processes, len(rows) - bar.n))
            gathered = gather_object(list(scores.items()))
            yield from (score for _, score in sorted(gathered, key=lambda item: item[0]))
    finally:
        bar.close()
        answerer.release()
        model.train(was_training)


@torch.no_grad()
def score_batch(
    answerer: Answerer, groups: Sequence[PromptGroup], continuations: list[Tensor], keep: Tensor | None, name: str
) -> dict[int, Tensor]:
    """Row number -> log-probabilities of one batch."""
    answerer.make_room(sum(map(answerer.slots_of, groups)), sum(len(group.rows) for group in groups))
    scores = {}
    with answerer.as_named(name):
        for part in in_chunks(groups, answerer.chunk_tokens):
            chunk = lay_out(part, answerer.decoder.device)
            prompts, ends, rows = with_continuations(part, continuations, answerer.decoder.device)
            hidden = answerer.embed(prompts, answerer.see(chunk))
            asked = torch.tensor(ends, device=answerer.decoder.device)
            last = answerer.decoder.prefill(hidden, prompts, asked, answerer.pool, 0)
            lines = 1 + len(continuations)
            for row, states in zip(rows, last.split(lines), strict=True):
                log_probabilities = answerer.decoder.logits(states).float().log_softmax(-1)
                scores[row] = (log_probabilities if keep is None else log_probabilities[:, keep]).cpu()
    return scores


def with_continuations(
    groups: Sequence[PromptGroup], continuations: list[Tensor], device: torch.device
) -> tuple[PackedPrompts, list[int], list[int]]:
    """The groups with a branch for each continuation behind each prompt.

    Returns the layout, the last tokens of each row's prompt and continuations, row by row, and the rows' numbers.
    """
    alone, shared = by_length(groups)
    segments = [Segment(group.prefix) for group in (*alone, *shared)]
    leaves = list(range(len(alone)))
    branches: list[list[int]] = []

    def branch(leaf: int) -> None:
        branches.append(list(range(len(segments), len(segments) + len(continuations))))
        segments.extend(Segment(tokens, leaf) for tokens in continuations)

    for leaf in leaves:
        branch(leaf)
    for number, group in enumerate(shared):
        for own in group.own:
            leaves.append(len(segments))
            segments.append(Segment(own, len(alone) + number))
    for leaf in leaves[len(alone) :]:
        branch(leaf)
    prompts = PackedPrompts(segments, device)
    ends = [prompts.ends[part] - 1 for leaf, of_leaf in zip(leaves, branches, strict=True) for part in (leaf, *of_leaf)]
    return prompts, ends, [row for group in (*alone, *shared) for row in group.rows]
