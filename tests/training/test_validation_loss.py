"""eval_loss is the mean over supervised tokens, for every batch size and packing; long rows are cut only where asked."""

import pytest
import torch
from datasets import Dataset

from finetuning.arguments import parse_arguments
from finetuning.evaluation.perplexity import answer_losses
from finetuning.models.loading import load_base_model
from finetuning.models.processing import load_processing_class
from finetuning.training.step_metrics import ShowProgress
from finetuning.training.trainer import FineTuningTrainer
from support.training import GEMMA_SAMPLE

ROWS = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": "Count the people."},
                {"role": "assistant", "content": "one " * (1 + 7 * (number % 3))},
            ]
        }
        for number in range(7)
    ]
)


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_gemma):
    return load_base_model(str(tiny_gemma), dtype=torch.float32).eval(), load_processing_class(str(tiny_gemma))


def trainer_of(model_and_tokenizer, output, *flags: str) -> FineTuningTrainer:
    _, args, _ = parse_arguments(GEMMA_SAMPLE, [
        *("--report_to", "none", "--output_dir", str(output), "--dataloader_num_workers", "0", *flags),
    ])  # fmt: skip
    model, tokenizer = model_and_tokenizer
    return FineTuningTrainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer)


def test_eval_loss_is_the_mean_over_tokens_for_every_batch_size_and_packing(model_and_tokenizer, tmp_path):
    losses = answer_losses(*model_and_tokenizer, ROWS["messages"], batch_size=1)
    expected = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    of_rows = sum(loss.total / loss.num_tokens for loss in losses) / len(losses)
    assert abs(of_rows - expected) > 0.01  # the mean of rows' means is another number
    found = []
    for flags in (
        *(["--per_device_eval_batch_size", size] for size in ("1", "3", "20")),
        ["--packing", "true", "--max_length", "128", "--per_device_eval_batch_size", "2"],
    ):
        trainer = trainer_of(model_and_tokenizer, tmp_path, *flags)
        trainer.remove_callback(ShowProgress)  # of a training, which this is not
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert [metrics[name] for metrics in found] == pytest.approx([found[0][name]] * 4, rel=1e-5)
    assert found[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--packing", "true"]])
def test_rows_that_would_be_cut_are_refused_by_number_unless_the_recipe_cuts_them(
    flags, model_and_tokenizer, tmp_path, capsys
):
    lengths = [len(model_and_tokenizer[1].apply_chat_template(messages)["input_ids"]) for messages in ROWS["messages"]]
    limit = sorted(set(lengths))[1]
    given = [*flags, "--max_length", str(limit)]
    with pytest.raises(ValueError) as refused:
        trainer_of(model_and_tokenizer, tmp_path, *given)
    assert f"2 of 7 train rows are longer than max_length: {limit} tokens (rows 2, 5;" in str(refused.value)
    assert f"set max_length: {max(lengths)}, shorten these rows, or set truncate: true" in str(refused.value)
    trainer = trainer_of(model_and_tokenizer, tmp_path, *given, "--truncate", "true")
    assert "2 of 7 train rows are longer" in capsys.readouterr().out
    assert max(map(len, trainer.train_dataset["input_ids"])) == limit
    # Divided rows lose nothing.
    if flags:
        trainer = trainer_of(model_and_tokenizer, tmp_path, *given, "--packing_strategy", "bfd_split")
        assert sum(map(len, trainer.train_dataset["input_ids"])) == sum(lengths)
