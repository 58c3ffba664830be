"""Batches that are decoded while the next one's prompts are computed: the same answers, and memory that runs out."""

import threading

import pytest
import torch

from finetuning.inference import answer_stream
from finetuning.inference.answer_stream import AnswerStream
from finetuning.inference.answerer import Answerer
from finetuning.inference.prompt_reader import PromptReader, group_rows, image_ids_of
from support.answering import load, one_by_one, text_rows, vision_rows


def prompts_of(processing_class, rows):
    reader = PromptReader(processing_class, rows)
    return [group for numbers in group_rows(image_ids_of(rows), range(len(rows))) for group in reader.read(numbers)]


def in_order(batches, name="tuned"):
    answers = {row: texts[name] for batch in batches for row, texts in batch.items()}
    return [answers[row] for row in sorted(answers)]


def test_answers_of_both_models_while_batches_overlap(tiny_llava, monkeypatch):
    model, processor = load(tiny_llava, adapter=True)
    rows = vision_rows()
    tuned = one_by_one(model, processor, rows)
    with model.disable_adapter():
        base = one_by_one(model, processor, rows)
    monkeypatch.setattr(answer_stream, "FIRST_CHUNK_TOKENS", 1)
    answerer = Answerer(model, processor, max_new_tokens=12, batch_size=2)
    decode, threads = answerer.decode, []
    monkeypatch.setattr(
        answerer, "decode", lambda prefill: threads.append(threading.current_thread().name) or decode(prefill)
    )
    batches = list(AnswerStream(answerer, ("tuned", "base"), overlaps=True).answers(prompts_of(processor, rows)))
    assert len(batches) > 3 and all(len(batch) <= 2 for batch in batches)
    assert in_order(batches) == tuned and in_order(batches, "base") == base
    assert len(threads) == 2 * len(batches) and all(name.startswith("decode") for name in threads)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("fails", ["prefill", "decode"])
def test_memory_that_runs_out_half_way_costs_no_answer(fails, overlaps, tiny_gemma, monkeypatch):
    model, tokenizer = load(tiny_gemma, adapter=True)
    rows = text_rows() * 2
    expected = one_by_one(model, tokenizer, rows[:5], 6) * 2
    said, calls = [], []
    answerer = Answerer(model, tokenizer, max_new_tokens=6, batch_size=4, say=said.append)
    owner, method = (answerer.decoder, "prefill") if fails == "prefill" else (answerer, "decode")
    compute = getattr(owner, method)

    def once_too_little(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return compute(*args)

    monkeypatch.setattr(owner, method, once_too_little)
    batches = list(AnswerStream(answerer, overlaps=overlaps).answers(prompts_of(tokenizer, rows)))
    assert in_order(batches) == expected
    assert len(said) == 1 and "does not fit" in said[0]


def test_a_prompt_that_is_longer_than_all_before_gets_room(tiny_gemma):
    model, tokenizer = load(tiny_gemma, adapter=False)
    long = {"messages": [{"role": "user", "content": "How many people are in this picture of the crossing? " * 20}]}
    rows = [*text_rows(), long, *text_rows()]
    answerer = Answerer(model, tokenizer, max_new_tokens=6, batch_size=2)
    batches = list(AnswerStream(answerer, overlaps=True).answers(prompts_of(tokenizer, rows)))
    assert in_order(batches) == one_by_one(model, tokenizer, rows, 6)
