"""Scores of text equal the published tools' to the last digits, and Korean endings make no difference.

reference_scores.jsonl holds 200 answers with ten references each, and what the tools made of them: anls-star 1.0.1,
the evaluation code of VQA (GT-Vision-Lab/VQA, commit c4e6a0e), the F1 of SQuAD in torchmetrics 1.9.0, rouge-score 0.1.2.
Rows whose first reference is Korean hold KorQuAD's F1 of letters, and rouge-score's over letters.
"""

import json
from pathlib import Path

import pytest

from finetuning.tasks.answer_text import normalise, same_answer
from finetuning.tasks.text_scores import anls, rouge_l, token_f1, vqa_accuracy

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "reference_scores.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("anls", anls),
        ("vqa_accuracy", vqa_accuracy),
        ("token_f1", lambda answer, references: token_f1(answer, references[0])),
        ("rouge_l", lambda answer, references: rouge_l(answer, references[0])),
    ],
)
def test_200_mixed_pairs_score_as_the_published_tools_score_them(name, score):
    expected = [row[name] for row in ROWS]
    assert len(expected) == 200 and sum(0 < value < 1 for value in expected) >= 20
    found = [score(row["answer"], row["references"]) for row in ROWS]
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("강아지입니다", "강아지"),
        ("강아지입니다.", "강아지예요"),
        ("강아지가", "강아지"),
        ("빨간 색", "빨간색"),
        ("서울역에서", "서울역"),
        ("The dog.", "dog"),
        ("U.S.A", "usa"),
        ("바다", "바다"),
    ],
)
def test_what_says_the_same_is_the_same_answer(answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("바", "바다"), ("고양", "고양이"), ("dogs", "dog"), ("", "dog"), ("강아지와 고양이", "강아지")],
)
def test_what_says_something_else_is_not(answer, reference):
    assert not same_answer(answer, reference)


def test_particles_that_do_not_fit_the_syllable_before_them_stay():
    assert not same_answer("강아지을", "강아지")  # 을 follows a final consonant
    assert normalise("  The  Dog! ") == "dog"
