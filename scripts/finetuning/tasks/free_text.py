"""The task `free_text`: sentences. What is scored is shared words, which says little of what is true."""

from collections.abc import Mapping

from finetuning.pages import Say
from finetuning.tasks.base import Measure, Question, Questions, Task, Trivial, always
from finetuning.tasks.text_scores import rouge_l, token_f1

TYPICAL_OF = 40  # train answers among which the most typical one is looked for


class FreeText(Task):
    """Token F1 and ROUGE-L of an answer, the best over its references; for Korean over letters, not words."""

    name = "free_text"
    title = ("free text", "자유로운 글")
    measures = (
        Measure("token_f1", ("words shared with the reference (F1)", "참조 답과 겹치는 말 (F1)")),
        Measure("rouge_l", ("ROUGE-L", "ROUGE-L")),
    )
    columns = {  # noqa: RUF012
        "token_f1": ("token F1", "토큰 F1"), "rouge_l": ("ROUGE-L", "ROUGE-L"), "words": ("words", "단어 수"),
    }  # fmt: skip
    amounts = ("words",)
    note = (
        "These count words shared with a reference: a true answer in other words scores low, a false one in the same words "
        "high (one wrong number, one not). A change here says that the wording came closer, no more. Read the answers.",
        "참조 답과 겹치는 말만 셉니다. 다른 말로 한 맞는 답은 낮게, 같은 말로 한 틀린 답은 (수 하나, 부정어 하나만 틀려도) 높게 나옵니다. 이 점수의 "
        "변화는 말투가 가까워졌다는 뜻일 뿐입니다. 답을 직접 읽어 보세요.",
    )

    def score(self, question: Question, answer: str) -> dict[str, float]:
        references = question["references"]
        return {
            "token_f1": max(token_f1(answer, reference) for reference in references),
            "rouge_l": max(rouge_l(answer, reference) for reference in references),
            "words": float(len(answer.split())),
        }

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        """The train answer that shares most words with the others: more than the commonest, which may occur once."""
        answers = [question["reference"] for question in train[:: max(1, len(train) // TYPICAL_OF)]][:TYPICAL_OF]
        if not answers:
            return {}
        answer = max(answers, key=lambda answer: sum(token_f1(answer, other) for other in answers))
        shown = answer if len(answer) <= 40 else answer[:39] + "…"
        return {"train_typical": always(answer, ("typical of train", "학습 데이터에 전형적"), shown=repr(shown))}

    def is_right(self, score: Mapping[str, float]) -> bool:
        return score["token_f1"] == 1

    def remark(self, question: Question, answer: str, say: Say) -> str:
        scores = self.score(question, answer)
        return f"F1 {scores['token_f1']:.2f}, ROUGE-L {scores['rouge_l']:.2f}"
