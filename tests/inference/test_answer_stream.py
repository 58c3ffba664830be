"""Batches that are decoded while the next one's prompts are computed: the same answers, and memory that runs out."""

import threading

import pytest
import torch

from finetuning.data.count_tree import AnswerForm
from finetuning.inference import answer_stream
from finetuning.inference.answer_stream import AnswerStream
from finetuning.inference.answerer import LIKELIHOODS, Answerer
from finetuning.inference.count_distribution import CountReader, read_by_transformers
from finetuning.inference.generation import answer_rows
from finetuning.inference.packed_prompts import (
    PackedPrompts,
    Segment,
    packed_attention,
    tree_attention,
    varlen_attention,
)
from finetuning.inference.prompt_reader import PromptReader, group_rows, image_ids_of
from support.answering import QUESTIONS, both_one_by_one, load, one_by_one, text_rows, vision_rows


def prompts_of(processing_class, rows):
    reader = PromptReader(processing_class, rows)
    return [group for numbers in group_rows(image_ids_of(rows), range(len(rows))) for group in reader.read(numbers)]


def in_order(batches, name="tuned"):
    answers = {row: texts[name] for batch in batches for row, texts in batch.items()}
    return [answers[row] for row in sorted(answers)]


@pytest.mark.slow
def test_answers_of_both_models_while_batches_overlap(tiny_llava, monkeypatch):
    model, processor = load(tiny_llava, adapter=True)
    rows = vision_rows()
    tuned, base = both_one_by_one(model, processor, rows)
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


def test_counts_are_read_from_the_pass_that_answers(tiny_llava, monkeypatch):
    """Shared prefixes, prompts alone, questions without a count, both models: the same numbers as by the reader alone."""
    model, processor = load(tiny_llava, adapter=True)
    rows = vision_rows()
    forms = {QUESTIONS[0]: AnswerForm("There are ", " people."), QUESTIONS[1]: AnswerForm("", "명")}
    reader = CountReader(model, processor, forms, 23)
    expected = read_by_transformers(reader, rows, batch_size=1, description="Counting")
    assert [values is None for values in expected].count(True) == 2
    tuned = one_by_one(model, processor, rows)
    (window,) = answer_rows(
        model, processor, rows, max_new_tokens=12, names=("tuned", "base"), trees=reader.trees_of(rows)
    )
    assert window["tuned"] == tuned
    for given, wanted in zip(window[LIKELIHOODS], expected, strict=True):
        assert (given is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(torch.tensor(given), torch.tensor(wanted), atol=1e-4, rtol=0)


def test_attention_of_trees_and_their_ancestors_is_that_of_whole_rows():
    """What a GPU does in parts, here in fp32: each tree's tokens by themselves, then joined with what is before them."""
    torch.manual_seed(0)
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    query, key, value = torch.randn(3, 2, 4, 3, 8)
    attended, log_sum = tree_attention(query, key, value, sees, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=0.3)
    torch.testing.assert_close(attended, expected)
    scores = (query @ key.mT * 0.3).masked_fill(~sees, float("-inf"))
    torch.testing.assert_close(log_sum, scores.logsumexp(-1))


def varlen_on_a_cpu(query, key, value, ends_q, ends_k, *lengths, scale, window_size=(-1, -1), return_aux):
    """What torch's variable-length kernel computes on a GPU: each sequence by itself, and the log-sums (heads, tokens)."""
    out, log_sum = torch.zeros_like(query), torch.full(query.shape[:2], float("-inf"))
    spans = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    for first, last, first_key, last_key in (map(int, span) for span in spans):
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key[first_key:last_key]) * scale
        if window_size == (-1, 0):
            mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril(last_key - first_key - last + first)
            scores = scores.masked_fill(~mask, float("-inf"))
        log_sum[first:last] = scores.logsumexp(-1).T
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[first_key:last_key])
    return out, log_sum.T


def test_the_layout_of_a_gpu_attends_as_the_plain_one(monkeypatch):
    """Prompts alone and shared ones, with trees behind both, by the code that a GPU runs around its kernel."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_on_a_cpu)
    torch.manual_seed(0)
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    tree = {"sees": sees, "steps": torch.tensor([0, 1, 1])}
    tokens = torch.arange
    segments = [Segment(tokens(5)), Segment(tokens(4)), Segment(tokens(6)), Segment(tokens(7))]
    segments += [Segment(tokens(3), 0, **tree), Segment(tokens(2), 2), Segment(tokens(1), 2), Segment(tokens(3), 3)]
    segments += [Segment(tokens(3), 5, **tree), Segment(tokens(3), 7, **tree)]
    prompts = PackedPrompts(segments)
    assert prompts.positions[prompts.starts[8] :].tolist()[:3] == [8, 9, 9]
    query, key, value = torch.randn(3, len(prompts.tokens), 2, 8)
    expected = packed_attention(prompts, query, key, value, 0.3)
    torch.testing.assert_close(varlen_attention(prompts, query, key, value, 0.3), expected)
