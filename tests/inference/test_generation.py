"""The packed path answers as transformers' `generate` does, one row at a time, in fp32 token for token."""

import pytest
import torch

from finetuning.data.collator import prompt_batch
from finetuning.inference import generation
from finetuning.inference.answerer import Answerer
from finetuning.inference.generation import answer_batch, answer_one, answer_rows, generate_answers
from finetuning.inference.packed_decoder import reason_against
from finetuning.inference.prompt_reader import PromptReader, group_rows, image_ids_of
from support.answering import both_one_by_one, load, one_by_one, text_rows, vision_rows


@pytest.mark.parametrize("adapter", [None, "LoRA", "DoRA"])
@pytest.mark.parametrize("kind", ["llava", "gemma"])
def test_answers_are_those_of_generate_one_row_at_a_time(kind, adapter, request):
    folder = request.getfixturevalue(f"tiny_{kind}")
    model, processing_class = load(folder, adapter=adapter is not None, use_dora=adapter == "DoRA")
    rows = vision_rows() if kind == "llava" else text_rows()
    expected = one_by_one(model, processing_class, rows)
    assert len(set(expected)) > 2
    assert generate_answers(model, processing_class, rows, batch_size="auto", max_new_tokens=12) == expected
    assert generate_answers(model, processing_class, rows, batch_size=2, max_new_tokens=12) == expected


@pytest.mark.slow
def test_base_and_tuned_come_together_and_pictures_are_seen_once(tiny_llava, monkeypatch):
    model, processor = load(tiny_llava, adapter=True)
    rows = vision_rows()
    tuned, base = both_one_by_one(model, processor, rows)
    assert tuned != base
    seen = []
    llava = model.get_base_model().model
    see = llava.get_image_features
    monkeypatch.setattr(
        llava,
        "get_image_features",
        lambda pixel_values, **kwargs: seen.append(len(pixel_values)) or see(pixel_values, **kwargs),
    )
    windows = list(answer_rows(model, processor, rows, max_new_tokens=12, names=("tuned", "base")))
    assert windows == [{"tuned": tuned, "base": base}]
    assert sum(seen) == 6  # the picture of several questions once; again for the row whose prompt begins differently
    assert one_by_one(model, processor, rows) == tuned  # generate still works on the model that was fused


def test_loader_processes_and_windows_change_nothing(tiny_llava, monkeypatch):
    model, processor = load(tiny_llava, adapter=False)
    rows = [
        row | {"image_id": row.get("image_id") and f"{row['image_id']}-{time}"}
        for time in range(3)
        for row in vision_rows()
    ]
    expected = one_by_one(model, processor, rows[: len(vision_rows())], 6) * 3
    monkeypatch.setattr("finetuning.inference.prompt_reader.loader_processes", lambda fetches, has_pictures: 2)
    monkeypatch.setattr(generation, "BATCHES_A_WINDOW", 2)
    windows = list(answer_rows(model, processor, rows, batch_size=4, max_new_tokens=6))
    assert [len(window["tuned"]) for window in windows] == [8, 8, 8]
    assert [text for window in windows for text in window["tuned"]] == expected


def test_a_batch_that_does_not_fit_is_halved_and_said(tiny_gemma, monkeypatch):
    model, tokenizer = load(tiny_gemma, adapter=False)
    rows = text_rows()
    said = []
    answerer = Answerer(model, tokenizer, max_new_tokens=6, say=said.append)
    prefill, sizes = answerer.decoder.prefill, []

    def small_memory(hidden, prompts, asked, *args):
        sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("no memory")
        return prefill(hidden, prompts, asked, *args)

    monkeypatch.setattr(answerer.decoder, "prefill", small_memory)
    reader = PromptReader(tokenizer, rows)
    groups = [group for numbers in group_rows(image_ids_of(rows), range(len(rows))) for group in reader.read(numbers)]
    (batch,) = answerer.batches(groups)
    answers = answerer.answer(batch)
    assert [answers[number]["tuned"] for number in range(len(rows))] == one_by_one(model, tokenizer, rows, 6)
    assert sizes[0] == 5 and said == [
        "A batch of 5 questions does not fit the GPU's memory: at most 2 at once from here"
    ]
    monkeypatch.setattr(
        answerer.decoder, "prefill", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(ValueError, match="no memory for a single question"):
        answerer.answer(batch)


def test_prompts_have_the_tokens_of_the_collator(tiny_llava):
    _, processor = load(tiny_llava, adapter=False)
    rows = vision_rows()
    reader = PromptReader(processor, rows)
    groups = [group for numbers in group_rows(image_ids_of(rows), range(len(rows))) for group in reader.read(numbers)]
    tokens = {}
    for group in groups:
        for row, own in zip(group.rows, group.own or [group.prefix[:0]], strict=True):
            tokens[row] = torch.cat([group.prefix, own]).tolist()
    for number, row in enumerate(rows):
        assert tokens[number] == prompt_batch(processor, [row])["input_ids"][0].tolist()


def test_a_mistake_in_a_row_is_a_value_error_from_a_loader_process_too(tiny_llava, monkeypatch):
    model, processor = load(tiny_llava, adapter=False)
    monkeypatch.setattr("finetuning.inference.prompt_reader.loader_processes", lambda fetches, has_pictures: 1)

    class Broken(list):
        def __getitem__(self, number):
            raise ValueError("frames/7.jpg: this picture is broken")

    rows = Broken(vision_rows())
    monkeypatch.setattr("finetuning.inference.prompt_reader.has_images", lambda rows, number: True)
    with pytest.raises(ValueError, match=r"^frames/7.jpg: this picture is broken$"):
        generate_answers(model, processor, rows, max_new_tokens=4)


def test_one_answer_streams(tiny_gemma):
    model, tokenizer = load(tiny_gemma, adapter=True)

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens.append(tokens.flatten().tolist())

        def end(self):
            self.ended = True

    row = text_rows()[0]
    ours, theirs = Streamer(), Streamer()
    assert (
        answer_one(model, tokenizer, row, max_new_tokens=8, streamer=ours) == one_by_one(model, tokenizer, [row], 8)[0]
    )
    answer_batch(model, tokenizer, [row], max_new_tokens=8, streamer=theirs)
    assert ours.tokens == theirs.tokens and ours.ended


def test_what_the_packed_path_does_not_know_is_answered_by_generate(tiny_gemma):
    model, tokenizer = load(tiny_gemma, adapter=False)
    assert reason_against(model) is None
    model.generation_config.repetition_penalty = 1.7
    assert reason_against(model) == "its generation_config sets repetition_penalty"
    rows = text_rows()
    assert generate_answers(model, tokenizer, rows, batch_size=3, max_new_tokens=8) == one_by_one(
        model, tokenizer, rows, 8
    )
