"""Did training help? Against the base, and against the best answer that needs no look at the question."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from finetuning.evaluation.bootstrap import MIN_GROUPS, Difference, compare
from finetuning.pages import Say

BEATEN, MATCHED = "beaten by a trivial answer", "matched by a trivial answer"


@dataclass(frozen=True)
class Verdict:
    """One measure: `tuned` against `base`, and against the best trivial answer where there is one."""

    against_base: Difference
    against_trivial: Difference | None = None  # its `base` is the trivial answer
    trivial: str = ""

    @property
    def outcome(self) -> str:
        """That against the base; but what is better than the base and not than a trivial answer is matched or beaten."""
        outcome = self.against_base.outcome
        if outcome != "better" or self.against_trivial is None or self.against_trivial.outcome == "better":
            return outcome
        return BEATEN if self.against_trivial.outcome == "worse" else MATCHED

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the comparison to the best trivial answer where there is one."""
        values = self.against_base.as_dict() | {"outcome": self.outcome}
        if self.against_trivial is not None:
            values["trivial"] = {"answer": self.trivial} | self.against_trivial.as_dict()
        return values


def judge(
    measure: str,
    values: dict[str, Sequence[float]],
    groups: Sequence[Hashable],
    *,
    lower_is_better: bool,
    trivial: dict[str, str],
    **settings: Any,
) -> Verdict:
    """The verdict on one measure.

    `values` holds one number per item for `base`, `tuned` and each trivial answer; `trivial` the trivial answers' keys
    with what to call them. The best of them is chosen on these very items, which favours it: the model has to beat that.
    """
    settings |= {"lower_is_better": lower_is_better}
    against_base = compare(measure, values["base"], values["tuned"], groups, **settings)
    if not trivial:
        return Verdict(against_base)
    best = (min if lower_is_better else max)(trivial, key=lambda name: sum(values[name]))
    return Verdict(against_base, compare(measure, values[best], values["tuned"], groups, **settings), trivial[best])


# The outcome as the first words of a sentence.
KOREAN_OUTCOMES = {
    "better": "나아졌습니다",
    "worse": "나빠졌습니다",
    "no measurable change": "잴 수 있는 변화가 없습니다",
    "too few to tell": "판단하기에 너무 적습니다",
    MATCHED: "보지 않고 하는 답과 다르지 않습니다",
    BEATEN: "보지 않고 하는 답보다 못합니다",
}


def in_blocks(difference: Difference, say: Say) -> str:
    """What is said of frames of a video: that neighbours are not independent, and how many independent ones tell as much."""
    if difference.num_independent is None or difference.block == 1:
        return ""
    return say(
        f" in order, drawn in blocks of {difference.block} neighbours, worth {difference.num_independent} independent ones",
        f" (번호 순서로 이웃 {difference.block}개씩 묶어 추출, 독립인 {difference.num_independent}개의 값어치)",
    )


def describe(verdict: Verdict, say: Say) -> str:
    """`headline` and `details` of a verdict."""
    return f"{headline(verdict, say)} {details(verdict, say)}"


def headline(verdict: Verdict, say: Say) -> str:
    """The outcome, and what the measure was before and after."""
    base, outcome = verdict.against_base, say(verdict.outcome.capitalize(), KOREAN_OUTCOMES[verdict.outcome])
    return say(
        f"{outcome}: {base.measure} went from {base.base:.2f} to {with_unit(base.tuned, base, say)}",
        f"{outcome}: {base.measure} {base.base:.2f} → {with_unit(base.tuned, base, say)}",
    )


def details(verdict: Verdict, say: Say) -> str:
    """The intervals of both differences, and what the trivial answer would score."""
    base, trivial = verdict.against_base, verdict.against_trivial
    if verdict.outcome == "too few to tell":
        return say(
            f"(but {base.num_groups} {base.grouped_by}{in_blocks(base, say)} decide nothing; use {MIN_GROUPS} or more).",
            f"({base.grouped_by} {base.num_groups}개{in_blocks(base, say)}로는 아무것도 정해지지 않습니다. {MIN_GROUPS}개 이상 "
            "쓰세요).",
        )
    includes_0 = say(", which includes 0", ", 0을 포함합니다") if base.low <= 0 <= base.high else ""
    text = say(
        f"(a change of {base.difference:+.2f}, 95 % interval {base.low:+.2f} to {base.high:+.2f}, over {base.num_groups} "
        f"{base.grouped_by}{in_blocks(base, say)}{includes_0}).",
        f"(변화 {base.difference:+.2f}, 95 % 구간 {base.low:+.2f} ~ {base.high:+.2f}, {base.grouped_by} {base.num_groups}개"
        f"{in_blocks(base, say)}{includes_0}).",
    )
    if trivial is None:
        return text
    return text + say(
        f" {verdict.trivial[:1].upper()}{verdict.trivial[1:]} would score {with_unit(trivial.base, trivial, say)}: the tuned "
        f"model differs by {trivial.difference:+.2f}, 95 % interval {trivial.low:+.2f} to {trivial.high:+.2f}.",
        f" {verdict.trivial}: {with_unit(trivial.base, trivial, say)}. 미세 조정 모델과의 차이 {trivial.difference:+.2f}, 95 % 구간 "
        f"{trivial.low:+.2f} ~ {trivial.high:+.2f}.",
    )


def with_unit(value: float, difference: Difference, say: Say) -> str:
    """The value with two decimals and its unit, as the language writes them."""
    unit = difference.unit
    return f"{value:.2f}{say(' ', '') if unit and unit != '%' else ' ' if unit else ''}{unit}"
