"""The task `short_answer`: a word or a few, such as a name, a colour, a text in a picture; one or more references."""

from collections.abc import Mapping

from finetuning.pages import Say
from finetuning.tasks.answer_text import same_answer
from finetuning.tasks.base import COMMONEST, Measure, Question, Questions, Task, Trivial, always, commonest
from finetuning.tasks.text_scores import ENOUGH_REFERENCES, anls, vqa_accuracy, vqa_punctuation, vqa_words


class ShortAnswer(Task):
    """Exact match after normalisation; VQA accuracy where a row has four references or more; ANLS for text in pictures.

    `accuracy` is VQA accuracy where there is one, else exact match. Articles, case, punctuation and what Korean adds to
    the end of a word (강아지입니다) make no difference.
    """

    name = "short_answer"
    title = ("short answers", "짧은 답")
    measures = (Measure("accuracy", ("answers right", "맞은 답")), Measure("anls", ("ANLS", "ANLS")))
    columns = {  # noqa: RUF012
        "accuracy": ("right", "맞음"), "exact": ("exact match", "정확히 일치"),
        "vqa_accuracy": ("VQA accuracy", "VQA 정확도"), "anls": ("ANLS", "ANLS"),
    }  # fmt: skip
    note = (
        "Right: VQA accuracy where a question has four references or more, else exact match with one of them after "
        "normalisation. ANLS forgives misread letters.",
        "맞음: 참조 답이 네 개 이상이면 VQA 정확도, 아니면 정규화한 뒤 참조 답 하나와 정확히 일치하는 비율입니다. ANLS는 글자를 조금 잘못 읽은 "
        "답도 일부 인정합니다.",
    )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        references = question["references"]
        matching = next((reference for reference in references if same_answer(answer, reference)), None)
        exact = float(matching is not None)
        # A match in other words, as 강아지입니다 for 강아지, is scored as the reference that it matches.
        said = answer if matching is None else matching
        scores = {"accuracy": exact, "exact": exact, "anls": anls(said, references)}
        if len(references) >= ENOUGH_REFERENCES:
            vqa = vqa_accuracy(said, [vqa_words(vqa_punctuation(reference)) for reference in references])
            scores |= {"accuracy": vqa, "vqa_accuracy": vqa}
        return scores

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        answer = commonest([question["reference"] for question in train])
        return {} if answer is None else {"train_commonest": always(answer, COMMONEST, shown=repr(answer))}

    def is_right(self, score: Mapping[str, float]) -> bool:
        return score["exact"] == 1

    def remark(self, question: Question, answer: str, say: Say) -> str:
        scores = self.score(question, answer)
        if scores["accuracy"] in (0, 1):
            right = say("right", "맞음") if scores["accuracy"] else say("wrong", "틀림")
        else:
            right = say(f"{scores['accuracy']:.0%} right", f"{scores['accuracy']:.0%} 맞음")
        return right if scores["accuracy"] == 1 else f"{right}, ANLS {scores['anls']:.2f}"
