"""The task `number`: questions whose answer is one number, with or without a unit."""

import re
import statistics
import unicodedata
from typing import NamedTuple

from finetuning.pages import Say
from finetuning.tasks.base import Measure, Question, Questions, Scores, Summary, Task, Trivial, Unscorable, always
from finetuning.tasks.count_parser import parse_count

# Unit -> (what it measures, how many of that quantity's first unit it is). Other words after a number (3 red cars, 3대)
# say what is counted, which the question says too: they are passed over.
UNITS = {
    "m": ("length", 1), "meter": ("length", 1), "metre": ("length", 1), "미터": ("length", 1),
    "mm": ("length", 1e-3), "밀리미터": ("length", 1e-3), "cm": ("length", 1e-2), "센티미터": ("length", 1e-2),
    "센티": ("length", 1e-2), "km": ("length", 1e3), "킬로미터": ("length", 1e3),
    "inch": ("length", 0.0254), "inches": ("length", 0.0254), "foot": ("length", 0.3048), "feet": ("length", 0.3048),
    "ft": ("length", 0.3048), "mile": ("length", 1609.344), "yard": ("length", 0.9144),
    "kg": ("mass", 1), "kilogram": ("mass", 1), "킬로그램": ("mass", 1), "킬로": ("mass", 1),
    "g": ("mass", 1e-3), "gram": ("mass", 1e-3), "그램": ("mass", 1e-3), "mg": ("mass", 1e-6), "밀리그램": ("mass", 1e-6),
    "t": ("mass", 1e3), "ton": ("mass", 1e3), "tonne": ("mass", 1e3), "톤": ("mass", 1e3),
    "lb": ("mass", 0.45359237), "pound": ("mass", 0.45359237), "oz": ("mass", 0.028349523125),
    "s": ("time", 1), "sec": ("time", 1), "second": ("time", 1), "초": ("time", 1),
    "min": ("time", 60), "minute": ("time", 60), "분": ("time", 60),
    "h": ("time", 3600), "hour": ("time", 3600), "시간": ("time", 3600),
    "day": ("time", 86_400), "일": ("time", 86_400), "week": ("time", 604_800), "주": ("time", 604_800),
    "l": ("volume", 1), "liter": ("volume", 1), "litre": ("volume", 1), "리터": ("volume", 1),
    "ml": ("volume", 1e-3), "밀리리터": ("volume", 1e-3),
    "%": ("share", 1e-2), "percent": ("share", 1e-2), "퍼센트": ("share", 1e-2), "프로": ("share", 1e-2),
    "원": ("won", 1), "won": ("won", 1), "₩": ("won", 1), "$": ("dollar", 1), "dollar": ("dollar", 1), "달러": ("dollar", 1),
    "usd": ("dollar", 1), "€": ("euro", 1), "euro": ("euro", 1), "유로": ("euro", 1),
    "°c": ("celsius", 1), "℃": ("celsius", 1), "도": ("degree", 1), "degree": ("degree", 1), "°": ("degree", 1),
}  # fmt: skip
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "천": 1e3, "만": 1e4, "억": 1e8}
_unit = r"%|°\s?c\b|°|[$€₩]|[a-z]+|" + "|".join(
    sorted((word for word in UNITS if word[0] >= "가"), key=len, reverse=True)
)
NUMBER = re.compile(
    r"(?P<currency>[$€₩])?\s?(?P<sign>[-−](?=\d))?(?P<digits>(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w\d])\.\d+)"
    rf"(?:\s?(?P<scale>thousand|million|billion|천|만|억)(?![가-힣](?<!원)))?(?:\s?-?(?P<unit>{_unit}))?"
)
MOST_OFF = 0.05


class Quantity(NamedTuple):
    """A number in the first unit of its dimension, or as it is where it has no unit; `factor` turns it back."""

    value: float
    dimension: str | None
    factor: float = 1.0


def parse_number(answer: str) -> Quantity | None:
    """The one number that an answer states, with its unit; None when it states none, or two that differ.

    Digits ("1,200.5", "3만 원", "$2 million"); without any, numbers of people in words, as `parse_count` reads them.
    """
    text = unicodedata.normalize("NFKC", answer).lower()
    found = {_quantity(match) for match in NUMBER.finditer(text)}
    if not found:
        count = parse_count(answer)
        return None if count is None else Quantity(float(count), None)
    if len({(quantity.value, quantity.dimension) for quantity in found}) > 1:
        return None
    return found.pop()


def _quantity(match: re.Match) -> Quantity:
    value = float(match["digits"].replace(",", "")) * SCALES.get(match["scale"] or "", 1)
    value = -value if match["sign"] else value
    unit = (match["unit"] or match["currency"] or "").replace(" ", "")
    for spelling in (unit, unit.removesuffix("s")):
        if spelling in UNITS:
            dimension, factor = UNITS[spelling]
            return Quantity(value * factor, dimension, factor)
    return Quantity(value, None)


def value_in_unit_of(quantity: Quantity | None, truth: Quantity) -> float | None:
    """The number in the unit of `truth`; without a unit it is taken to be in it. None when it measures something else."""
    if quantity is None:
        return None
    if quantity.dimension is None or truth.dimension is None:
        return quantity.value / quantity.factor
    return quantity.value / truth.factor if quantity.dimension == truth.dimension else None


class Number(Task):
    """Absolute error in the unit of the reference, and relaxed accuracy: right within 5 % (Methani et al., WACV 2020).

    An answer without one number, or in a unit of something else, costs as much as answering 0 and is wrong.
    """

    name = "number"
    title = ("numbers", "수")
    measures = (
        Measure("penalised_mae", ("mean absolute error", "평균 절대 오차"), lower_is_better=True, percent=False),
        Measure("within_5_percent", ("right within 5 %", "5 % 안으로 맞음")),
    )
    columns = {  # noqa: RUF012
        "penalised_mae": ("MAE, penalised", "MAE, 벌점 포함"), "mae": ("MAE", "MAE"),
        "median_error": ("median error", "오차 중앙값"), "relative_error": ("relative error", "상대 오차"),
        "within_5_percent": ("within 5 %", "5 % 이내"), "exact": ("exact", "정확"),
        "unparsable_rate": ("unparsable", "읽을 수 없음"),
    }  # fmt: skip
    amounts = ("penalised_mae", "mae", "median_error")
    note = (
        "In the unit of each reference. MAE, median error and relative error (of what is not 0) are over the answers that "
        "state a number; in the penalised MAE an answer that states none costs as much as answering 0.",
        "참조 답의 단위로 계산합니다. MAE, 오차 중앙값, 상대 오차(정답이 0이 아닌 경우)는 수를 말한 답만으로 냅니다. 벌점 포함 MAE에서는 수를 말하지 "
        "않은 답을 0이라고 답한 것으로 칩니다.",
    )

    def refuse_reference(self, question: str, reference: str) -> None:
        if parse_number(reference) is None:
            raise Unscorable("its answer does not state one number")

    def score(self, question: Question, answer: str) -> dict[str, float]:
        truth = parse_number(question["reference"])
        right = truth.value / truth.factor
        value = value_in_unit_of(parse_number(answer), truth)
        error = abs((value or 0.0) - right)
        close = value is not None and error <= MOST_OFF * abs(right) * (1 + 1e-9)
        scores = {"penalised_mae": error, "within_5_percent": float(close)}
        scores |= {
            "exact": float(value is not None and error <= 1e-9 * abs(right)),
            "unparsable_rate": float(value is None),
        }
        if value is not None:
            scores |= {"mae": error} | ({"relative_error": error / abs(right)} if right else {})
        return scores

    def summarise(self, scores: Scores) -> Summary:
        errors = [score["mae"] for score in scores if "mae" in score]
        means = {"mae": None, "relative_error": None} | super().summarise(scores)
        return means | {"median_error": statistics.median(errors) if errors else None}

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        values = []
        for question in train:
            truth = parse_number(question["reference"])
            values.append(truth.value / truth.factor)
        if not values:
            return {}
        middle = f"{statistics.median_low(values):g}"
        return {"train_median": always(middle, ("train median", "학습 데이터의 중앙값"))}

    def remark(self, question: Question, answer: str, say: Say) -> str:
        truth = parse_number(question["reference"])
        value = value_in_unit_of(parse_number(answer), truth)
        if value is None:
            return say("states no number", "수가 없음")
        error = abs(value - truth.value / truth.factor)
        return say(
            f"read as {value:g}, {f'off by {error:g}' if error else 'right'}",
            f"{value:g}(으)로 읽음, {f'{error:g} 틀림' if error else '맞음'}",
        )
