"""The likelihoods of all counts from one pass over the prompt are those of one pass for each count."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from finetuning.data.collator import prompt_batch
from finetuning.data.count_tree import AnswerForm, count_sequences
from finetuning.data.dataset import open_dataset
from finetuning.inference.count_distribution import CountReader, largest_candidate, read_counts
from finetuning.kernels.model_patches import ignore_right_padding
from finetuning.kernels.shared_prefix_attention import enable_shared_prefix
from finetuning.models.loading import load_for_inference
from support.tokenizers_of_tests import merging_tokenizer

LARGEST = 105
FORMS = {
    "How many people are in view?": AnswerForm("There are ", " people."),
    "몇 명인가요?": AnswerForm("", "명입니다."),
}


def one_pass_each(model, processing_class, row, form) -> torch.Tensor:
    """Log-likelihood of each count's tokens, by a forward pass of its own over prompt and tokens."""
    prompt = prompt_batch(processing_class, [row])
    likelihoods = []
    for sequence in count_sequences(processing_class, row["messages"], form, LARGEST):
        ids = torch.cat([prompt["input_ids"], torch.tensor([sequence])], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in prompt:
            inputs["pixel_values"] = prompt["pixel_values"]
        logits = model(**inputs).logits[0, -len(sequence) - 1 : -1].log_softmax(-1)
        likelihoods.append(logits.gather(1, torch.tensor(sequence)[:, None]).sum())
    return torch.stack(likelihoods)


@torch.no_grad()
def assert_equal_to_one_pass_each(model, processing_class, rows):
    reader = CountReader(model, processing_class, FORMS, LARGEST)
    together = read_counts(reader, rows, batch_size=len(rows))
    for row, likelihoods in zip(rows, together, strict=True):
        form = FORMS[row["messages"][-1]["content"]]
        expected = one_pass_each(model, processing_class, row, form)
        assert expected.std() > 1e-3  # the model tells the counts apart
        torch.testing.assert_close(torch.tensor(likelihoods), expected, atol=1e-5, rtol=0)


def as_row(question: str, image) -> dict:
    return {"messages": [{"role": "user", "content": question}], "images": [image] if image is not None else []}


@pytest.mark.slow
def test_a_vision_model_with_single_digits(tiny_llava, cctv_dataset):
    model, processor = load_for_inference(str(tiny_llava), dtype=torch.float32)
    frames = [row["images"][0] for row in open_dataset(str(cctv_dataset), vision=True)["train"].select(range(3))]
    # Prompts of different lengths in one batch, so that the shorter ones are padded.
    rows = [as_row(question, frame) for question in FORMS for frame in frames]
    assert_equal_to_one_pass_each(model, processor, rows)


def test_a_model_prepared_for_training_counts_as_one_that_is_not(tiny_llava, cctv_dataset):
    model, processor = load_for_inference(str(tiny_llava), dtype=torch.float32)
    frame = open_dataset(str(cctv_dataset), vision=True)["train"][0]["images"][0]
    rows = [as_row(question, frame) for question in FORMS]
    before = read_counts(CountReader(model, processor, FORMS, 30), rows, batch_size=2)
    ignore_right_padding(model)
    enable_shared_prefix(model)
    after = read_counts(CountReader(model, processor, FORMS, 30), rows, batch_size=2)
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), atol=1e-5, rtol=0)


def test_a_text_model_with_merged_digits():
    tokenizer = merging_tokenizer()
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    model = GemmaForCausalLM(config).eval()
    assert_equal_to_one_pass_each(model, tokenizer, [as_row(question, None) for question in FORMS])


def test_a_question_that_training_never_asked_is_no_count(tiny_llava, cctv_dataset):
    model, processor = load_for_inference(str(tiny_llava), dtype=torch.float32)
    frame = open_dataset(str(cctv_dataset), vision=True)["train"][0]["images"][0]
    reader = CountReader(model, processor, FORMS, 12)
    rows = [
        as_row("Is it crowded?", frame),
        as_row("몇 명인가요?", frame),
        as_row("How many people are in view?", None),
    ]
    counts = read_counts(reader, rows, batch_size=3)
    assert counts[0] is None
    assert [len(values) for values in counts[1:]] == [13, 13]


@pytest.mark.parametrize(("counts", "largest"), [([], 20), ([4, 9], 20), ([13, 53], 80)])
def test_candidates_reach_beyond_what_training_showed(counts, largest):
    assert largest_candidate(counts) == largest
