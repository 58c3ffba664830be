"""Asking a model many questions: greedy, batched, over all processes, in order."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from finetuning.data.collator import prompt_batch, stop_tokens
from finetuning.data.count_tree import CountTree
from finetuning.inference.answer_stream import AnswerStream
from finetuning.inference.answerer import LIKELIHOODS, Answerer
from finetuning.inference.packed_decoder import reason_against
from finetuning.inference.prompt_reader import PromptReader, cut_windows, group_rows, image_ids_of, read_prompts
from finetuning.models.picture_parameters import without_adapter
from finetuning.strategy import Strategy

# Rows that a process answers between two results, where the batch size is chosen here: just under a full batch.
WINDOW = 240
BATCHES_A_WINDOW = 16
DEFAULT_BATCH = 16  # of transformers' own generate, where a batch size is to be chosen


def answer_rows(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int | str = "auto",
    names: Sequence[str] = ("tuned",),
    trees: Mapping[int, CountTree] | None = None,
    description: str = "Answering",
) -> Iterator[dict[str, list[Any]]]:
    """Greedy answers in the order of the rows, a window at a time, on every process: for each of `names` a list.

    `rows` is a list or Dataset (or another sequence, with `image_ids`) with `messages` that end with a user turn, and
    `images` for a vision model. Rows with the same `image_id` share its computation. `names` may hold "tuned" (the model
    as it is) and "base" (a PeftModel's adapter switched off); both at once see each picture once. `batch_size` is the
    most rows at once on a process, `auto` what its free memory holds. Windows are dealt out over the processes.

    With `trees` (row number -> tree; only where `packs(model)`) a window holds LIKELIHOODS too: for each row the
    log-likelihoods of its tree's counts, as the first of `names` finds them, or None.

    Raises ValueError for a row that cannot be asked, and where not one row fits the GPU.
    """
    state = PartialState()
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.device.type == "cuda":
        # What the host computes is small. After each such piece the threads of all cores would spin for a while (OpenMP).
        torch.set_num_threads(1)
    window = WINDOW * state.num_processes if batch_size == "auto" else BATCHES_A_WINDOW * int(batch_size)
    windows = cut_windows(image_ids_of(rows), window)
    if packs(model):
        answered = answer_packed(model, processing_class, rows, windows, names, batch_size, max_new_tokens, trees)
    else:
        size = DEFAULT_BATCH if batch_size == "auto" else int(batch_size)
        answered = answer_by_transformers(model, processing_class, rows, windows, names, size, max_new_tokens)
    try:
        with tqdm(
            total=len(rows), desc=description, unit="answer", disable=not state.is_main_process, leave=False
        ) as bar:
            for numbers in windows:
                mine: list[tuple[int, dict[str, Any]]] = []
                for answers in next(answered):
                    mine += answers
                    bar.update(min(len(answers) * state.num_processes, numbers.stop - bar.n))
                whole = [answers for _, answers in sorted(gather_object(mine), key=lambda answer: answer[0])]
                bar.update(numbers.stop - bar.n)
                window = {name: [answers[name] for answers in whole] for name in names}
                yield window | ({} if trees is None else {LIKELIHOODS: [answers.get(LIKELIHOODS) for answers in whole]})
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)
        answered.close()


def packs(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the packed path answers for this model here; if not, transformers' `generate` does."""
    return not Strategy.from_environment().shards_weights and reason_against(model) is None


def answer_packed(
    model, processing_class, rows, windows, names, batch_size, max_new_tokens, trees
) -> Iterator[Iterator[list[tuple[int, dict[str, Any]]]]]:
    """For each window the batches of this process, as (row number, answer of each name)."""
    state = PartialState()
    image_ids = image_ids_of(rows)
    groups = [group_rows(image_ids, numbers)[state.process_index :: state.num_processes] for numbers in windows]
    prompts = read_prompts(PromptReader(processing_class, rows, model.dtype), groups)  # reading begins
    answerer = Answerer(
        model,
        processing_class,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        trees=trees,
        say=lambda text: tqdm.write(text),
    )
    answerer.most_rows = min(answerer.most_rows, max(sum(len(rows) for window in groups for rows in window), 1))
    # Over the windows' ends: the last steps of one go on beside the first prompts of the next.
    stream = AnswerStream(answerer, names).answers(chain.from_iterable(prompts))
    early: dict[int, dict[str, Any]] = {}

    def of_window(missing: set[int]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        while missing:
            early.update(next(stream) if missing.isdisjoint(early) else {})
            found = missing.intersection(early)
            missing -= found
            yield [(number, early.pop(number)) for number in found]

    try:
        for window in groups:
            yield of_window({number for numbers in window for number in numbers})
    finally:
        stream.close()
        answerer.release()


def answer_by_transformers(
    model, processing_class, rows, windows, names, batch_size, max_new_tokens
) -> Iterator[Iterator[list[tuple[int, dict[str, str]]]]]:
    """The same by `answer_batch`: for sharded weights, whose passes all processes make together, and unknown decoders."""
    state = PartialState()
    # A Dataset's column is read without decoding a single picture.
    messages = rows["messages"] if isinstance(rows, Dataset) else [row["messages"] for row in rows]
    lengths = [sum(len(turn["content"]) for turn in turns) for turns in messages]

    def of_window(numbers: range) -> Iterator[list[tuple[int, dict[str, str]]]]:
        order = sorted(numbers, key=lengths.__getitem__)
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        mine = batches[state.process_index :: state.num_processes]
        # Where weights are sharded, a process without a batch would hang the others: it answers one unheard.
        turns = -(-len(batches) // state.num_processes)
        unheard = batches[:1] if Strategy.from_environment().shards_weights and len(mine) < turns else []
        for number, indices in enumerate(mine + unheard):
            batch = [rows[index] for index in indices]
            texts = {}
            for name in names:
                off = without_adapter(model) if name == "base" and isinstance(model, PeftModel) else nullcontext()
                with off:
                    texts[name] = answer_batch(model, processing_class, batch, max_new_tokens=max_new_tokens)
            answers = [(index, {name: texts[name][place] for name in names}) for place, index in enumerate(indices)]
            yield answers if number < len(mine) else []

    for numbers in windows:
        yield of_window(numbers)


def generate_answers(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int | str = "auto",
    max_new_tokens: int,
    description: str = "Answering",
) -> list[str]:
    """One greedy answer per row, in the order of the rows, on every process: `answer_rows` to its end."""
    windows = answer_rows(
        model,
        processing_class,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        description=description,
    )
    return [text for window in windows for text in window["tuned"]]


def answer_one(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    row: dict[str, Any],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    answerer: Answerer | None = None,
) -> str:
    """The greedy answer of one row, on this process; `streamer` shows its words as they come.

    An `Answerer` that is given is used: the second question finds its memory and its graphs ready.
    """
    if answerer is None:
        if Strategy.from_environment().shards_weights or reason_against(model):
            return answer_batch(model, processing_class, [row], max_new_tokens=max_new_tokens, streamer=streamer)[0]
        answerer = Answerer(model, processing_class, max_new_tokens=max_new_tokens, batch_size=1)
    groups = PromptReader(processing_class, [row], model.dtype).read([0])
    on_token = None
    if streamer is not None:
        streamer.put(groups[0].prefix[None])  # the prompt, which streamers of transformers expect first

        def on_token(token: int) -> None:
            streamer.put(torch.tensor([token]))

    answer = answerer.answer(groups, on_token=on_token)[0]["tuned"]
    if streamer is not None:
        streamer.end()
    return answer


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """One greedy answer per row by transformers' `generate`, as one left-padded batch on this process.

    What `answer_rows` is held against, and what proofs of merged models ask.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    output, length = generate_greedily(
        model,
        processing_class,
        rows,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        synced_gpus=Strategy.from_environment().shards_weights,  # a process whose answers are done goes on until all are
    )
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def generate_greedily(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    **more: Any,
) -> tuple[Any, int]:
    """What transformers' `generate` returns for the prompts of `rows`, left-padded, and their length in tokens.

    `more` goes to `generate` as it is.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    inputs = prompt_batch(processing_class, rows).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(processing_class),
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return output, inputs["input_ids"].shape[1]
