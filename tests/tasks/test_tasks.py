"""Each task reads answers as people write them, in English and Korean, and scores them by its definition."""

import pytest

from finetuning.pages import speak
from finetuning.tasks.choice import Choice, parse_choice, read_options
from finetuning.tasks.exam import TASKS
from finetuning.tasks.free_text import FreeText
from finetuning.tasks.number import Number, parse_number
from finetuning.tasks.short_answer import ShortAnswer
from finetuning.tasks.yes_no import YesNo, parse_yes_no


def question(reference: str, text: str = "?", references: list[str] | None = None) -> dict:
    return {
        "row": 0,
        "image_id": "a",
        "question": text,
        "reference": reference,
        "references": references or [reference],
    }


def summary(task, questions, answers):
    return task.summarise(task.scores(questions, answers))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes, there is a dog.", True), ("yes", True), ("The answer is yes.", True), ("네, 있습니다.", True), ("예", True),
        ("맞습니다.", True), ("있습니다.", True), ("No, it isn't.", False), ("아니요.", False), ("아닙니다", False), ("없어요", False),
        ("No one is there", None), ("네 명입니다", None), ("예를 들어", None), ("Maybe", None), ("", None), ("Not a dog", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_from_the_beginning_of_an_answer(answer, said):
    assert parse_yes_no(answer) is said


def test_yes_no_scores_by_hand():
    questions = [question(text) for text in ("Yes.", "yes", "No.", "네", "아니요")]
    scores = summary(YesNo(), questions, ["yes", "no", "Yes", "네, 맞아요", "maybe"])
    # said yes: 3, of them right 2; true yes: 3
    assert scores == pytest.approx(
        {
            "n": 5, "accuracy": 0.4, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_share": 0.6,
            "true_yes_share": 0.6, "unread": 0.2,
        }
    )  # fmt: skip
    assert list(YesNo().trivial_answers(questions)) == ["always_yes"]
    assert YesNo().trivial_answers([question("no")])["train_commonest"][0] == "no"


LINES = "What colour is it?\nA. red\nB. blue\nC. dark green"
INLINE = "무슨 색인가요? (A) 빨강 (B) 파랑 (C) 초록"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (LINES, [("A", "red"), ("B", "blue"), ("C", "dark green")]),
        (INLINE, [("A", "빨강"), ("B", "파랑"), ("C", "초록")]),
        ("골라라 ① 개 ② 고양이", [("1", "개"), ("2", "고양이")]),
        ("Which? Options: cat, dog, bird", [("A", "cat"), ("B", "dog"), ("C", "bird")]),
        ("Is it A. or not?", []),
        ("How many people (about) are there?", []),
    ],
)
def test_options_are_read_from_the_question(text, options):
    assert list(read_options(text)) == options


@pytest.mark.parametrize(
    ("text", "answer", "label"),
    [
        (LINES, "B", "B"), (LINES, "(b)", "B"), (LINES, "B. blue", "B"), (LINES, "It is dark green.", "C"),
        (LINES, "The answer is C.", "C"), (LINES, "red or blue", None), (LINES, "yellow", None), (LINES, "A cat", None),
        (INLINE, "정답은 B입니다", "B"), (INLINE, "B번", "B"), (INLINE, "파랑입니다.", "B"),
    ],
)  # fmt: skip
def test_choices_are_read_by_label_or_by_text(text, answer, label):
    assert parse_choice(answer, read_options(text)) == label


def test_choice_scores_and_its_chance():
    questions = [question("B", LINES), question("초록", INLINE)]
    scores = summary(Choice(), questions, ["blue", "D"])
    assert scores == pytest.approx({"n": 2, "accuracy": 0.5, "unread": 0.5, "chance": 1 / 3})


@pytest.mark.parametrize(
    ("answer", "value", "dimension"),
    [
        ("7", 7, None), ("3.5 km", 3500, "length"), ("3,500m", 3500, "length"), ("약 3kg", 3, "mass"), ("25 percent", 0.25, "share"),
        ("$2 million", 2e6, "dollar"), ("3만 원", 30_000, "won"), ("-5°C", -5, "celsius"), ("12 red cars", 12, None),
        ("seven people", 7, None), ("about 10 meters tall", 10, "length"),
    ],
)  # fmt: skip
def test_numbers_are_read_with_their_unit(answer, value, dimension):
    found = parse_number(answer)
    assert (found.value, found.dimension) == (pytest.approx(value), dimension)


@pytest.mark.parametrize("answer", ["5 and 6", "1/2", "many", "", "2 km or 3 km"])
def test_what_states_no_one_number_is_no_number(answer):
    assert parse_number(answer) is None


def test_number_scores_are_in_the_unit_of_the_reference():
    questions = [question("2 km"), question("10"), question("4 kg"), question("5")]
    scores = summary(Number(), questions, ["2,050 m", "12 dogs", "4 m", "no idea"])
    assert scores["mae"] == pytest.approx((0.05 + 2) / 2) and scores["median_error"] == pytest.approx(1.025)
    assert scores["penalised_mae"] == pytest.approx((0.05 + 2 + 4 + 5) / 4)  # kilograms are no metres
    assert (scores["within_5_percent"], scores["unparsable_rate"]) == (0.25, 0.5)
    assert scores["relative_error"] == pytest.approx((0.025 + 0.2) / 2)


def test_short_answers_use_every_reference():
    task = ShortAnswer()
    ten = question("dog", references=["dog"] * 2 + ["puppy"] * 5 + ["cat"] * 3)
    assert task.score(ten, "A puppy.")["accuracy"] == 1.0
    assert task.score(ten, "dog")["accuracy"] == pytest.approx((2 / 3 * 8 + 1 / 3 * 2) / 10)
    two = question("STOP", references=["STOP", "stop sign"])
    assert task.score(two, "stop") == {"accuracy": 1.0, "exact": 1.0, "anls": 1.0}
    assert task.score(two, "stup") == {"accuracy": 0.0, "exact": 0.0, "anls": 0.75}
    assert task.score(question("강아지"), "강아지입니다.")["accuracy"] == 1.0


def test_free_text_takes_the_best_reference_and_says_how_little_it_means():
    scores = FreeText().score(question("a b", references=["a cat sits", "the dog runs fast"]), "the dog runs")
    assert scores["token_f1"] == pytest.approx(0.8) and scores["rouge_l"] == pytest.approx(6 / 7)
    assert "a true answer in other words scores low" in FreeText.note[0]


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"count"}))
def test_every_task_has_words_in_both_languages_and_a_trivial_answer_that_scores_no_skill(name):
    task = TASKS[name]
    reference, text = {"choice": ("B", LINES), "yes_no": ("Yes.", "?"), "number": ("7", "?")}.get(name, ("a dog", "?"))
    other = {"choice": "C", "yes_no": "No.", "number": "9"}.get(name, "a blue cat")
    questions = [question(reference, text)] * 3 + [question(other, text)]
    train = questions
    (answer, words), *_ = task.trivial_answers(train).values()

    def metrics_of(answers):
        return task.metrics(questions, answers, task.scores(questions, answers), train)

    metrics = metrics_of([answer] * 4)
    assert task.skill(metrics) == pytest.approx(0)
    assert task.skill(metrics_of([q["reference"] for q in questions])) == pytest.approx(1)
    assert "no better than" in task.sentence(metrics)
    korean = [task.title[1], words[1], task.note[1], *(measure.name[1] for measure in task.measures)]
    assert all(any("가" <= letter <= "힣" for letter in text) or text.isupper() or "-" in text for text in korean)
    assert task.remark(questions[0], answer, speak("ko")) and task.remark(questions[0], "", speak("en"))
