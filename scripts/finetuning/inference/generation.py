"""Asking a model many questions: greedy, batched, over all processes, in order."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from finetuning.data.collator import prompt_batch, stop_tokens
from finetuning.strategy import Strategy


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """One greedy answer per row, as one batch on this process; `streamer` shows a single row's words as they come."""
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
        streamer=streamer,
        synced_gpus=Strategy.from_environment().shards_weights,  # a process whose answers are done goes on until all are
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def generate_answers(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int,
    description: str = "Answering",
) -> list[str]:
    """One greedy answer per row, in the order of the rows, on every process.

    `rows` is a list or Dataset with `messages` that end with a user turn, and `images` for a vision model. Rows are
    batched by length, so that little is padded, and the batches are dealt out over the processes.
    """
    # A Dataset's column is read without decoding a single picture.
    messages = rows["messages"] if isinstance(rows, Dataset) else [row["messages"] for row in rows]
    lengths = [sum(len(turn["content"]) for turn in turns) for turns in messages]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    state = PartialState()
    answers: list[tuple[int, str]] = []
    was_training = model.training
    model.eval()
    mine = batches[state.process_index :: state.num_processes]
    # Where the weights are divided, a process without a batch would keep the others waiting: it answers one unheard.
    turns = -(-len(batches) // state.num_processes)
    unheard = batches[:1] if Strategy.from_environment().shards_weights and len(mine) < turns else []
    for indices in tqdm(mine + unheard, desc=description, unit="batch", disable=not state.is_main_process, leave=False):
        batch = [rows[index] for index in indices]
        texts = answer_batch(model, processing_class, batch, max_new_tokens=max_new_tokens)
        if len(answers) < sum(map(len, mine)):
            answers += zip(indices, texts, strict=True)
    model.train(was_training)
    return [text for _, text in sorted(gather_object(answers))]
