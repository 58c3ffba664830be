"""The task `choice`: questions that list their options, answered by a letter, a number or an option's text."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from finetuning.pages import Say
from finetuning.tasks.answer_text import answer_forms, normalise, without_copula
from finetuning.tasks.base import COMMONEST, Measure, Question, Questions, Task, Trivial, Unscorable, always, commonest

CIRCLED = {chr(ord("①") + number): str(number + 1) for number in range(20)}
# "A. red", "(B) green", "C: blue", "1) one", "① one", "가. 하나": a label, then its text up to the next label or line.
LABEL = r"(?:\(([A-J]|[1-9]|[가나다라마])\)|(?<![\w(])([A-J]|[1-9]|[가나다라마])[.):]|([①-⑳]))"
OPTION = re.compile(rf"(?:^|(?<=[\s,;:])){LABEL}[^\S\n]*(\S[^\n]*?)(?=[\s,;]+{LABEL}\s|[^\S\n]*(?:\n|$))")
LISTED = re.compile(r"(?:options|choices|choose (?:one )?from|one of|보기|선택지)\s*:\s*([^\n]+)", re.IGNORECASE)
ORDER = ("ABCDEFGHIJ", "123456789", "가나다라마")
SAID = re.compile(
    r"^(?:(?i:(?:the\s+)?(?:correct\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?)\s*:?\s*|정답은?\s*:?\s*|답은?\s*:?\s*)?"
    r"\(?(?P<label>[A-Ja-j]|[1-9]|[가나다라마])(?:\)|번|[.:,]|$|\s|(?=입니다|이에요|예요))"
)


@lru_cache(maxsize=4096)
def read_options(question: str) -> tuple[tuple[str, str], ...]:
    """(label, text) of each option that a question lists; empty where it lists none, or only one.

    Labels are letters, numbers or 가, 나, 다 in order from the first; options without labels ("Options: red, blue") get
    the letters A, B, ...
    """
    text = unicodedata.normalize("NFC", question)
    found = []
    for match in OPTION.finditer(text):
        label = match[1] or match[2] or CIRCLED[match[3]]
        found.append((label, match[4].strip(" ,;")))
    for order in ORDER:
        options = [option for option in found if option[0] in order]
        if len(options) >= 2 and "".join(label for label, _ in options) == order[: len(options)]:
            return tuple(options)
    if match := LISTED.search(text):
        texts = [part.strip(" .\"'") for part in re.split(r",|;|/|\bor\b", match[1])]
        texts = [part for part in texts if part]
        if len(texts) >= 2:
            return tuple(zip(ORDER[0], texts, strict=False))
    return ()


def parse_choice(answer: str, options: Sequence[tuple[str, str]]) -> str | None:
    """The label that an answer chooses: by its label, by its text, or by naming exactly one option's text."""
    text = unicodedata.normalize("NFC", answer).strip()
    for mark, number in CIRCLED.items():
        text = text.replace(mark, number + ". ")
    labels = {label.lower(): label for label, _ in options}
    forms = answer_forms(normalise(text))
    by_text = [label for label, option in options if {normalise(option), without_copula(normalise(option))} & forms]
    if len(by_text) == 1:
        return by_text[0]
    # "A dog" begins with an article, not with a choice: a bare capital letter must stand alone or before a mark.
    if (match := SAID.search(text)) and match["label"].lower() in labels:
        bare_word = match["label"] in "Aa" and text[match.end("label") :].startswith(" ")
        if not bare_word:
            return labels[match["label"].lower()]
    said = f" {normalise(text)} "
    named = [label for label, option in options if re.search(rf"(?<!\w){re.escape(normalise(option))}(?!\w)", said)]
    return named[0] if len(named) == 1 else None


class Choice(Task):
    """Accuracy over options that are read from the question, as ScienceQA counts it (Lu et al., NeurIPS 2022).

    An answer that chooses none of them is wrong.
    """

    name = "choice"
    title = ("choosing an option", "보기 고르기")
    measures = (Measure("accuracy", ("options right", "맞게 고름")),)
    columns = {  # noqa: RUF012
        "accuracy": ("right", "맞음"), "unread": ("chooses none", "고르지 않음"),
        "chance": ("by chance", "아무거나 고를 때"),
    }  # fmt: skip
    note = (
        "By chance: the mean of 1 / number of options. An answer that chooses none of the options is wrong.",
        "아무거나 고를 때: 1 / 보기 수의 평균입니다. 보기에 없는 답은 틀린 답입니다.",
    )

    def refuse_reference(self, question: str, reference: str) -> None:
        options = read_options(question)
        if not options:
            raise Unscorable("its question lists no options")
        if parse_choice(reference, options) is None:
            raise Unscorable("its answer is none of the question's options")

    def chosen(self, question: Question, answer: str) -> str | None:
        """The letter that an answer chooses; None where it is not to be told."""
        return parse_choice(answer, read_options(question["question"]))

    def score(self, question: Question, answer: str) -> dict[str, float]:
        chosen, options = self.chosen(question, answer), read_options(question["question"])
        right = chosen is not None and chosen == self.chosen(question, question["reference"])
        return {"accuracy": float(right), "unread": float(chosen is None), "chance": 1 / len(options)}

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        label = commonest([self.chosen(question, question["reference"]) for question in train])
        return {} if label is None else {"train_commonest": always(label, COMMONEST)}

    def remark(self, question: Question, answer: str, say: Say) -> str:
        chosen = self.chosen(question, answer)
        if chosen is None:
            return say("chooses none of the options", "보기를 고르지 않음")
        right = chosen == self.chosen(question, question["reference"])
        return say(
            f"read as {chosen}, {'right' if right else 'wrong'}", f"{chosen}로 읽음, {'맞음' if right else '틀림'}"
        )
