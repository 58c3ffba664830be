"""The task `yes_no`: questions whose answer begins with yes or no, in English or Korean."""

import re
import unicodedata

from finetuning.pages import Say
from finetuning.tasks.base import Measure, Question, Questions, Scores, Summary, Task, Trivial, Unscorable, commonest

YES = re.compile(
    r"^(?:(?:the )?answer(?: is)?:? )?(?:yes|yeah|yep|yup|true|correct)\b"
    # 네 is "four", too, before what is counted: 네 명, 네 개.
    r"|^(?:정답은 |답은 )?(?:네(?!\s*(?:명|개|마리|대|사람|시|살|번|장|권|분|가지|곳))|예|응|그렇습니다|그래요|맞습니다|맞아요|맞다|참|있습니다|있어요|있다|물론)"
    r"(?=$|[\s,.!])"
)
NO = re.compile(
    r"^(?:(?:the )?answer(?: is)?:? )?(?:no(?! (?:one|idea|way to))|nope|false|incorrect)\b"
    r"|^(?:정답은 |답은 )?(?:아니요|아니오|아뇨|아닙니다|아니에요|아니다|아니|거짓|틀렸습니다|없습니다|없어요|없다|그렇지 않습니다)"
    r"(?=$|[\s,.!])"
)


def parse_yes_no(answer: str) -> bool | None:
    """What an answer begins with: True for yes, False for no, None for anything else."""
    text = unicodedata.normalize("NFKC", answer).strip().strip("\"'*(").lower()
    return True if YES.search(text) else False if NO.search(text) else None


class YesNo(Task):
    """Accuracy; and precision, recall and F1 of yes with the share of yes, as POPE reports them (Li et al., EMNLP 2023).

    An answer that begins with neither is wrong, and no yes.
    """

    name = "yes_no"
    title = ("yes or no", "예/아니요")
    measures = (Measure("accuracy", ("answers right", "맞은 답")),)
    columns = {  # noqa: RUF012
        "accuracy": ("right", "맞음"), "f1": ("F1 of yes", "예의 F1"), "precision": ("precision", "정밀도"),
        "recall": ("recall", "재현율"), "yes_share": ("says yes", "예라고 답함"),
        "true_yes_share": ("yes is right", "예가 정답"), "unread": ("neither", "예도 아니요도 아님"),
    }  # fmt: skip
    note = (
        "An answer counts by the word that it begins with; one that begins with neither yes nor no is wrong.",
        "답이 시작하는 말로 판정합니다. 예나 아니요로 시작하지 않는 답은 틀린 답입니다.",
    )

    def refuse_reference(self, question: str, reference: str) -> None:
        if parse_yes_no(reference) is None:
            raise Unscorable("its answer begins with neither yes nor no")

    def score(self, question: Question, answer: str) -> dict[str, float]:
        said, true = parse_yes_no(answer), parse_yes_no(question["reference"])
        yes = {"yes_share": float(said is True), "true_yes_share": float(true is True), "unread": float(said is None)}
        return {"accuracy": float(said is true)} | yes

    def summarise(self, scores: Scores) -> Summary:
        hits = sum(score["yes_share"] and score["true_yes_share"] for score in scores)
        precision, recall = (
            hits / max(sum(score[key] for score in scores), 1) for key in ("yes_share", "true_yes_share")
        )
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        return super().summarise(scores) | {"precision": precision, "recall": recall, "f1": f1}

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        answer = commonest(["yes" if parse_yes_no(question["reference"]) else "no" for question in train])
        trivial: dict[str, Trivial] = {"always_yes": ("yes", ("always yes", "항상 예"))}
        if answer == "no":
            trivial["train_commonest"] = (
                "no",
                ("always no (commonest in train)", "항상 아니요 (학습 데이터에서 가장 흔함)"),
            )
        return trivial

    def remark(self, question: Question, answer: str, say: Say) -> str:
        said = parse_yes_no(answer)
        if said is None:
            return say("neither yes nor no", "예도 아니요도 아님")
        return say("right", "맞음") if said is parse_yes_no(question["reference"]) else say("wrong", "틀림")
