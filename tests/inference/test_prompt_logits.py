"""Logits behind continuations are those of the model asked with prompt and continuation, one by one."""

import torch

from finetuning.data.collator import prompt_batch
from finetuning.inference.prompt_logits import continuation_logits
from support.answering import load, vision_rows

CONTINUATIONS = [[5], [6, 7], [8, 9, 10]]


def expected(model, processor, row) -> torch.Tensor:
    lines = []
    for continuation in [[], *CONTINUATIONS]:
        batch = prompt_batch(processor, [row])
        more = torch.tensor([continuation], dtype=torch.long)
        batch["input_ids"] = torch.cat([batch["input_ids"], more], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.no_grad():
            lines.append(model(**batch).logits[0, -1].log_softmax(-1))
    return torch.stack(lines)


def test_continuations_are_branches_behind_shared_prompts(tiny_llava):
    model, processor = load(tiny_llava, adapter=True)
    rows = vision_rows()
    scores = list(continuation_logits(model, processor, rows, CONTINUATIONS, batch_size=3))
    for row, score in zip(rows, scores, strict=True):
        torch.testing.assert_close(score, expected(model, processor, row), rtol=1e-4, atol=1e-4)
    chosen = list(continuation_logits(model, processor, rows[:2], CONTINUATIONS, keep=[3, 11], name="base"))
    with model.disable_adapter():
        torch.testing.assert_close(chosen[1], expected(model, processor, rows[1])[:, [3, 11]], rtol=1e-4, atol=1e-4)
