"""The loss of the positions that a batch names is TRL's, and a training step asks nothing of the GPU to find them."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GraniteConfig, GraniteForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetuning.arguments import parse_arguments
from finetuning.data.collator import CollateSupervisedRows, LlavaDataCollator
from finetuning.kernels.linear_cross_entropy import use_supervised_rows
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.training.prepare_model import prepare_model
from finetuning.training.trainer import FineTuningTrainer
from support.raw_data import with_pictures
from support.tiny_models import DECODER, LANGUAGE_MODEL, llava_batch, lora_grads, relative_error, tiny_gemma, with_lora
from support.tiny_models import tiny_llava as random_llava
from support.training import SAMPLE, build

OUTPUTS = ("log_probs", "entropy", "is_top1")


def gemma_batch() -> dict[str, torch.Tensor]:
    batch = llava_batch()
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def scored(model, batch) -> dict[str, float]:
    model.zero_grad()
    output = model(**batch, fused_lm_head=True)
    output.loss.backward()
    sums = {name: getattr(output, name).sum().item() for name in (*OUTPUTS, "label_mask")}
    return sums | {"loss": output.loss.item()}


@pytest.mark.parametrize(
    ("make", "targets", "make_batch"), [(random_llava, LANGUAGE_MODEL, llava_batch), (tiny_gemma, DECODER, gemma_batch)]
)
def test_named_positions_are_scored_as_trl_scores_masked_ones(make, targets, make_batch):
    batch = make_batch()
    batch["labels"][0, -3] = -100
    named = CollateSupervisedRows(lambda examples: dict(batch))([{}, {}])
    # Two rows of 30 tokens, the last 5 of which are supervised; each is predicted from the position before.
    assert named["supervised_rows"].tolist() == [24, 25, 27, 28, 54, 55, 56, 57, 58]
    model = make()
    model.config.get_text_config().final_logit_softcapping = 3.0
    model = with_lora(model, targets)
    add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
    expected, expected_grads = scored(model, batch), lora_grads(model)
    use_supervised_rows(model.get_base_model())
    assert scored(model, batch) == expected  # nothing named: TRL's own code
    assert named.pop("num_supervised").tolist() == [4, 5]
    found = scored(model, named)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["label_mask"] == 9
    for name, grad in lora_grads(model).items():
        assert relative_error(grad, expected_grads[name]) < 1e-5


def test_a_batch_without_an_answer_has_a_loss_of_zero_and_a_gradient():
    model = with_lora(tiny_gemma(), DECODER)
    add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
    use_supervised_rows(model.get_base_model())
    batch = gemma_batch()
    batch["labels"][:] = -100
    named = CollateSupervisedRows(lambda examples: batch)([{}, {}])
    assert named.pop("num_supervised").tolist() == [0, 0]
    assert scored(model, named)["loss"] == 0
    assert all(not grad.any() for grad in lora_grads(model).values())


def test_a_model_that_scales_its_logits_keeps_the_code_that_knows_it():
    config = GraniteConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=100,
        logits_scaling=8.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GraniteForCausalLM(config)
    batch = gemma_batch()
    expected = float(model(**batch).loss)
    add_fused_lm_head(model, outputs=OUTPUTS)
    use_supervised_rows(model)
    named = CollateSupervisedRows(lambda examples: batch)([{}, {}])
    named.pop("num_supervised")
    assert scored(model, named)["loss"] == pytest.approx(expected, rel=1e-5)


class Questions(TorchDispatchMode):
    """Counts what, on a GPU, the host must wait for: results whose value or size it needs."""

    ASKING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)

    def __init__(self):
        super().__init__()
        self.asked: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function.overloadpacket in self.ASKING or masks:
            self.asked[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_training_step_asks_nothing(tiny_llava, cctv_dataset, tmp_path):
    script_args, args, lora_args = parse_arguments(SAMPLE, [
        *("--max_steps", "3", "--logging_steps", "3", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--report_to", "none", "--output_dir", str(tmp_path)),
    ])  # fmt: skip
    args.remove_unused_columns = False
    processor = load_processing_class(str(tiny_llava))
    model = set_trainable(build(tiny_llava), script_args, lora_args)
    prepare_model(model, script_args, args)
    trainer = FineTuningTrainer(
        model=model, args=args, train_dataset=with_pictures(cctv_dataset)["train"], processing_class=processor,
        data_collator=LlavaDataCollator(processor), checkpoint_layers=script_args.checkpoint_layers,
    )  # fmt: skip
    asked = []
    step = trainer.training_step

    def watched_step(*step_args, **kwargs):
        with Questions() as questions:
            loss = step(*step_args, **kwargs)
        asked.append(dict(questions.asked))
        return loss

    trainer.training_step = watched_step
    trainer.train()
    # The first time, transformers compares the number of image tokens with that of the features, and words a message.
    assert asked == [{"aten._local_scalar_dense.default": 2}, {}, {}]
    assert [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry] == [2248]
