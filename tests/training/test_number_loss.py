"""The losses over numbers: their values, their gradients, and that training's tree is the one that inference reads."""

import pytest
import torch
from PIL import Image
from trl.trainer.utils import add_fused_lm_head

from finetuning.arguments import ScriptArguments
from finetuning.data.collator import CollateSupervisedRows, LlavaDataCollator
from finetuning.data.count_tree import AnswerForm
from finetuning.data.number_targets import CountTrees, number_values
from finetuning.inference.count_distribution import CountReader
from finetuning.kernels.linear_cross_entropy import use_supervised_rows
from finetuning.kernels.model_patches import ignore_right_padding
from finetuning.models.loading import load_for_inference
from finetuning.training.number_loss import make_number_loss, number_token_loss, ranked_probability_score
from support.tokenizers_of_tests import merging_tokenizer

FORMS = {
    "How many people are in view?": AnswerForm("There are ", " people."),
    "몇 명인가요?": AnswerForm("", "명입니다."),
}
LARGEST = 45


@pytest.fixture(scope="module")
def model_and_processor(tiny_llava):
    return load_for_inference(str(tiny_llava), dtype=torch.float32)


def row(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [Image.linear_gradient("L").resize((64, 64))]}


def test_the_ranked_score_of_a_certain_answer_is_its_error_and_gradients_are_those_of_differences():
    certain = torch.full((3, 60), -1e4, dtype=torch.float64)
    certain[range(3), [23, 33, 5]] = 0.0
    assert ranked_probability_score(certain, torch.tensor([23, 23, -1])) == pytest.approx((0 + 10) / 2)
    # Twice as far is twice as much, wherever the digits change: 19 and 20 are neighbours.
    assert ranked_probability_score(certain[:1], torch.tensor([20])) == pytest.approx(3)
    torch.manual_seed(0)
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda given: ranked_probability_score(given, torch.tensor([4, -1, 11])), logits)
    assert ranked_probability_score(logits, torch.tensor([-1, -1, -1])) == 0


def test_the_number_token_loss_is_the_expected_distance_of_a_digit():
    numbers, truth = torch.arange(10, dtype=torch.float64), torch.tensor([3.0, 7.0], dtype=torch.float64)
    logits = torch.zeros(2, 10, dtype=torch.float64, requires_grad=True)
    expected = (sum(abs(n - 3) for n in range(10)) + sum(abs(n - 7) for n in range(10))) / 20
    assert number_token_loss(logits, numbers, truth).item() == pytest.approx(expected)
    torch.autograd.gradcheck(lambda given: number_token_loss(given, numbers, truth), logits + torch.randn(2, 10))
    assert number_token_loss(logits[:0], numbers, truth[:0]) == 0


def test_tokens_that_write_numbers_are_found_with_digits_one_by_one_and_merged(model_and_processor):
    for tokenizer in (model_and_processor[1].tokenizer, merging_tokenizer()):
        values = number_values(tokenizer)
        assert {int(value) for value in values[values.isfinite()]} >= set(range(10))
        assert values[tokenizer.convert_tokens_to_ids("7")] == 7
        assert values[tokenizer.eos_token_id].isnan()


def test_training_scores_the_distribution_that_inference_reads(model_and_processor):
    model, processor = model_and_processor
    rows = [
        row("How many people are in view?", "There are 7 people."),
        row("몇 명인가요?", "23명입니다."),
        row("How many people are in view?", "A lot of them."),  # states no count
    ]
    reader = CountReader(model, processor, FORMS, LARGEST)
    prompts = [given | {"messages": given["messages"][:1]} for given in rows[:2]]
    likelihoods = torch.tensor(reader.read_batch(prompts))
    expected = ranked_probability_score(likelihoods, torch.tensor([7, 23]))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    use_supervised_rows(model)
    ignore_right_padding(model)
    questions = [{"question": question, "reference": form.fill_in(30), "count": 30} for question, form in FORMS.items()]
    loss = make_number_loss(ScriptArguments("data", number_loss="crps"), processor, questions)
    batch = loss.collate(CollateSupervisedRows(LlavaDataCollator(processor)))(rows)
    batch.pop("num_supervised")
    assert batch["numbers"]["counts"].tolist() == [7, 23, -1]
    targets = batch.pop("numbers")
    model.train()
    plain = model(**batch, use_cache=False, fused_lm_head=True)
    outputs, value = loss.forward(model, dict(batch), targets)
    torch.testing.assert_close(outputs.log_probs, plain.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value, expected.float(), atol=1e-4, rtol=1e-4)
    # The gradient of one weight is that of differences.
    weight = model.get_output_embeddings().weight
    place = (int(targets["targets"][1, 23, 0]), 5)
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.abs().max() > 1e-4
    with torch.no_grad():
        sides = []
        for step in (0.02, -0.02):
            weight[place] += step
            sides.append(loss.forward(model, dict(batch), targets)[1].item())
            weight[place] -= step
    assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / 0.04, rel=0.02, abs=1e-4)


def test_rows_whose_answer_is_no_candidate_take_no_part(model_and_processor):
    processor = model_and_processor[1]
    collate = CountTrees(CollateSupervisedRows(LlavaDataCollator(processor)), processor, FORMS, LARGEST)
    assert "numbers" not in collate([row("How many people are in view?", "There are 46 people.")])  # beyond the largest
    assert "numbers" not in collate([row("Is it crowded?", "There are 4 people.")])
    several = row("몇 명인가요?", "4명입니다.")
    several["messages"] += row("몇 명인가요?", "5명입니다.")["messages"]
    assert "numbers" not in collate([several])


def test_crps_without_counts_in_digits_is_refused(model_and_processor):
    with pytest.raises(ValueError, match="none of the train split's does"):
        make_number_loss(ScriptArguments("data", number_loss="crps"), model_and_processor[1], [])
