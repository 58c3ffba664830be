"""Candidate counts as a tree of tokens, whatever a tokenizer makes of numbers."""

import pytest

from finetuning.data.count_tree import AnswerForm, answer_form, build_tree, count_sequences, learn_forms
from finetuning.models.processing import load_processing_class
from support.tokenizers_of_tests import TEMPLATE, merging_tokenizer

QUESTION = [{"role": "user", "content": "How many people are in view?"}]


def test_a_form_is_what_stands_around_the_number():
    assert answer_form("There are 23 people.", 23) == AnswerForm("There are ", " people.")
    assert answer_form("모두 7명이 보입니다.", 7) == AnswerForm("모두 ", "명이 보입니다.")
    assert answer_form("7", 7) == AnswerForm("", "")
    for answer in ("seven people", "There are 17 people.", "7 on the left, 7 on the right", "70 people"):
        assert answer_form(answer, 7) is None


def test_the_most_frequent_form_of_each_question_is_learned():
    forms = learn_forms(
        ["How many?", "How many?", "How many?", "몇 명?", "Busy?"],
        ["3 people.", "There are 4.", "5 people.", "6명입니다.", "Yes."],
        [3, 4, 5, 6, 7],
    )
    assert forms == {
        "": AnswerForm("", " people."),
        "How many?": AnswerForm("", " people."),
        "몇 명?": AnswerForm("", "명입니다."),
    }
    assert learn_forms(["Busy?"], ["Yes."], [7]) == {}


def test_shared_digits_are_one_node():
    tree = build_tree([[5, 9], [6, 9], [5, 6, 9], [5, 5, 9]])  # "0 end", "1 end", "01 end", "00 end"
    assert tree.tokens.tolist() == [5, 6, 6, 5]
    assert tree.depths.tolist() == [0, 0, 1, 1]
    assert tree.sees.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert tree.places.tolist() == [[0, 1, 0], [0, 2, 0], [0, 1, 3], [0, 1, 4]]
    assert tree.real.int().sum(1).tolist() == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "form", [AnswerForm("There are ", " people."), AnswerForm("", "명입니다."), AnswerForm("", "")]
)
@pytest.mark.parametrize("kind", ["single digits", "merged digits"])
def test_each_count_ends_with_the_token_that_ends_its_number(kind, form, tiny_llava):
    processing_class = load_processing_class(str(tiny_llava)) if kind == "single digits" else merging_tokenizer()
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    sequences = count_sequences(processing_class, QUESTION, form, 120)
    assert len({tuple(sequence) for sequence in sequences}) == 121
    for count, sequence in enumerate(sequences):
        number = tokenizer.decode(sequence[:-1]).strip()
        assert number == f"{form.before}{count}"
        assert len(tokenizer.decode(sequence, skip_special_tokens=False).strip()) > len(number)
    # No count is the beginning of another: the likelihoods are of different events.
    together = {tuple(sequence) for sequence in sequences}
    assert not any(sequence[:length] in together for sequence in together for length in range(1, len(sequence)))


def test_a_tokenizer_that_changes_the_prompt_is_refused():
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("assistant: {% endif", "assistant{% endif")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['role'] }}: {{", "m['role'] }}{{")
    with pytest.raises(ValueError, match="change"):
        count_sequences(tokenizer, QUESTION, AnswerForm(": ", ""), 3)
