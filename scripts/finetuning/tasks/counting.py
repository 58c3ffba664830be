"""Reading a number of people out of a written answer, and scoring such numbers.

Standard library only: data preparation checks its labels with the very function that later scores the model.
"""

import itertools
import math
import re
import statistics
import unicodedata
from typing import NamedTuple

# People, in both languages. 명 also begins ordinary words: 이 명단 is "this list", not "two people".
PEOPLE = (
    r"(?:people|persons?|individuals?|pedestrians?|humans?|figures?|heads?|shoppers?|visitors?|customers?|passengers?"
    r"|men|man|women|woman|adults?|children|child|kids?|boys?|girls?)\b"
)
FORMAL_COUNTER = r"(?:명(?!단|백|확|령|동|소|칭|함|암|절|작|품)|인(?!치|분|간))"
COUNTER = rf"(?:사람|{FORMAL_COUNTER})"
DESCRIBING = (
    r"(?:(?:visible|distinct|different|individual|adult|walking|standing|sitting|moving|or so|human|young)[\s-]+)*"
)
COUNTED = rf"(?:{DESCRIBING}{PEOPLE}|{COUNTER})"
APPROXIMATELY = r"(?:about|around|approximately|roughly|exactly|only|just|약|대략|정확히|단)"

# Numerals.
ENGLISH = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
NATIVE_TENS = {
    "열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50, "예순": 60, "일흔": 70, "여든": 80, "아흔": 90,
}  # fmt: skip
NATIVE_UNITS = {
    "하나": 1, "한": 1, "둘": 2, "두": 2, "셋": 3, "세": 3, "넷": 4, "네": 4,
    "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9,
}  # fmt: skip
SINO_UNITS = {"일": 1, "이": 2, "삼": 3, "사": 4, "오": 5, "육": 6, "칠": 7, "팔": 8, "구": 9}
SINO_SCALES = {"십": 10, "백": 100, "천": 1000}
# "One or two" to "eight or nine".
VAGUE = "(?:한두|두세|두서너|서너|너덧|너댓|네댓|네다섯|대여섯|예닐곱|일고여덟|여덟아홉)"

_units = "|".join(word for word, value in ENGLISH.items() if 1 <= value <= 9)
_teens = "|".join(word for word, value in ENGLISH.items() if 10 <= value <= 19)
_tens = "|".join(word for word, value in ENGLISH.items() if value >= 20)
_below_100 = rf"(?:(?:{_tens})(?:[\s-](?:{_units}))?|{_teens}|{_units}|zero)"
_below_1000 = rf"(?:(?:a|{_units})\s+hundred(?:\s+(?:and\s+)?{_below_100})?|{_below_100})"
_native_tens, _native_units = "|".join(NATIVE_TENS), "|".join(NATIVE_UNITS)
_sino_digit = f"[{''.join(SINO_UNITS)}]"
_sino_hundreds = rf"(?:{_sino_digit}?천\s?)?(?:{_sino_digit}?백\s?)?"

DIGITS = r"(?P<digits>(?<![a-z_\d.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<fraction>\.\d+)?)"
_thousands = rf"(?:a|{_below_1000})\s+thousand(?:,?\s+(?:and\s+)?{_below_1000})?"
ENGLISH_WORDS = rf"(?P<english>\b(?:{_thousands}|{_below_1000}|a\s+dozen)\b)"
NATIVE = rf"(?P<native>{_sino_hundreds}(?:(?:{_native_tens})\s?(?:{_native_units})?|{_native_units}))"
SINO = rf"(?P<sino>(?={_sino_digit}|[십백천]){_sino_hundreds}(?:{_sino_digit}?십\s?)?{_sino_digit}?)"
# Korean numerals are also parts of other words (이 사진 "this picture", 네 "yes", 열린 "open"). They count before a
# counter of people (세 분 is three people, while 3분 is three minutes), as the first of a pair (일곱이나 여덟 명), or when
# they end the answer (둘입니다).
_before_people = rf"(?=\s?(?:{COUNTER}|분(?!\s*(?:전|후|동안|뒤)))|(?:이나)?\s?(?:{_native_tens}|{_native_units}))"
_ending = r"(?:(?<=[둘셋넷])|(?<=[가-힣]{2}))(?=\s*(?:입니다|이다|이에요|예요|이요|요|이고|$|[.,!)]))"
KOREAN_WORDS = (
    rf"(?:(?<![가-힣])|(?<=[총약]))(?:(?P<vague>(?:{_native_tens})?\s?{VAGUE})(?=\s?(?:{COUNTER}|분))"
    rf"|{NATIVE}(?:{_before_people}|{_ending})|{SINO}(?=\s?{FORMAL_COUNTER}))"
)
NUMBER = re.compile(f"{DIGITS}|{ENGLISH_WORDS}|{KOREAN_WORDS}")

# Sentences that refuse, doubt or ask.
DOUBT = re.compile(
    r"cannot|can't|can not|unable|sorry|not sure|unsure|uncertain|(?:don't|do not) know|impossible|not possible|hard to"
    r"|difficult to|unclear|not clear|no way to|\?"
    r"|수\s?가?\s?없|모르|모릅|어렵|어려|불가|죄송|확실하지|확실치|불확실|불분명|아닙니다|아니다|아니에요"
)
NOBODY = re.compile(
    rf"(?:\b(?:no|zero|without any)|(?:n't|\bnot)(?: see)? any)\s+{DESCRIBING}{PEOPLE}"
    r"|\b(?:there is|there's|see|sees) (?:no one|nobody)\b"
    # "No one is looking at the camera" is not a count.
    r"|\b(?:no one|nobody)(?: (?:is|can be))?(?: (?:visible|here|there|seen|present|in|at all)\b|\s*(?:[.!]|$))"
    r"|아무도\s*(?:없|안 보|보이지)|(?:한|단 한)\s?(?:명|사람)도\s*(?:없|안 보|보이지)"
    # Nor is 앉아 있는 사람이 없습니다, "nobody is sitting".
    r"|(?:(?<![은는인한던린진]\s)|(?<=[에서]는\s)|(?<=보이는\s))(?:사람|인원|보행자)[이은도]?\s*(?:전혀\s*|아무도\s*)?"
    r"(?:없|안 보이|보이지 않)"
    r"|^\s*(?:none|없습니다|없음|없어요|없다)\s*[.!]?\s*$"
)
DATE_OR_TIME = re.compile(
    r"\d{2,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{4}\s*년(?:\s*\d{1,2}\s*월)?(?:\s*\d{1,2}\s*일)?"
    r"|\d{1,2}:\d{2}(?::\d{2})?(?:\s*[ap]m\b)?"
)
# "frame 12", "camera no. 3": a name, unless people follow ("in the image 7 people walk").
NUMBERED_THING = re.compile(
    r"(?:frame|image|photo|picture|camera|cam|scene|floor|zone|프레임|카메라|사진|이미지|영상)\s*(?:#|no\.?|number)?\s*\d+"
    rf"(?!\d|[.,]\d|\s*{COUNTED})"
)
BOUND_BEFORE = re.compile(
    r"(?:at least|at most|(?:more|less|fewer|greater) than|over|under|below|above|up to|minimum of|maximum of"
    r"|(?:not|n't)(?: see)?|최소|최소한|최대|적어도|많아야)\s*$"
)
BOUND_AFTER = re.compile(
    rf"^\s*(?:\+|{COUNTED}?\s*(?:(?:or|and) (?:more|fewer|less|above|over)\b|이상|이하|미만|초과|남짓|넘))"
)
HEDGE = r"(?:or|to|maybe|perhaps|possibly|이나|나|에서|부터|또는|혹은|아니면|내지|아마도?)"
BETWEEN_TWO = re.compile(
    rf"^\s*(?:[,/~–—-]?|and|{COUNTED}\s*[/~–—-]|{COUNTED}?[\s,(]*(?:{HEDGE}[\s,]*)+(?:{APPROXIMATELY})?)\s*$"
)
PEOPLE_AFTER = re.compile(rf"^\)?\s*{COUNTED}")
PEOPLE_BEFORE = re.compile(
    rf"(?:(?:number|count|total)\s+of\s+{DESCRIBING}{PEOPLE}[^.;,\d]{{0,60}}?(?:\bis|\bare|=|:)"
    rf"|{PEOPLE}(?:\s+count)?\s*(?:=|:|\bis)"
    rf"|(?:사람|인원)들?(?:의)?\s?수?(?:은|는|이|가)?\s*[:=]?)\s*(?:(?:총|모두|전부|{APPROXIMATELY})\s*)*$"
)
PHRASE_END = re.compile(r"^\s*(?:$|[.,;!)]|입니다|이다|이에요|예요|정도|쯤)")
TOTAL_BEFORE = re.compile(
    rf"(?:total of|in total,?|altogether,?|총|모두|전부|도합|합계|합쳐서?)\s*(?:{APPROXIMATELY}\s*)?$"
)
TOTAL_AFTER = re.compile(rf"^\s*{COUNTED}\s*(?:in total|altogether|in all)\b")
YEAR = re.compile(r"(?:19|20)\d\d")
# What may stand around a bare number ("There are 7.", "답: 7") without giving it another meaning.
FILLER = re.compile(
    r"(?:there|are|is|it|i|we|can|see|count|counted|answer|total|number|in|of|a|the|this|that|here|frame|image|picture|photo"
    rf"|scene|visible|shown|present|or|so|s|{APPROXIMATELY}|{PEOPLE})\b"
    r"|(?:네|예|사람들?|인원|수|답변?|정답|총|모두|전부|화면|사진|이미지|영상|장면|프레임|합계|보이는|명|정도|쯤"
    r"|에는?|에서|의|은|는|이|가|입니다|이에요|예요|이요|이다|요|있습니다|보입니다|있어요|보여요)+(?![가-힣])"
    r"|[^\w%$€₩°#-]+"
)


# No picture shows more people than this that anyone could count; one 22222222222 would be the whole mean error.
LARGEST_COUNT = 9_999


class _Number(NamedTuple):
    start: int
    end: int
    value: int | None  # None: a decimal, a negative or absurd number, or a vague pair such as 두세 (two or three)
    korean: bool


def parse_count(text: str) -> int | None:
    """The number of people that a Korean or English answer states, or None when it does not state exactly one.

    Digits ("7명", "1,024"), English words ("twenty-three people") and Korean numerals, native and Sino-Korean ("스물세
    명", "이십삼 명"), are read. The rules, in order:

    1. A sentence that refuses, doubts or asks ("I cannot tell", "알 수 없습니다") states nothing. Dates, clock times and
       the numbers of frames, images and cameras are passed over.
    2. Numbers bound to people ("7 people", "사람 수는 7") and words for nobody ("no one", "아무도 없습니다") are the
       answer. Of these, numbers marked as the total ("총 10명", "a total of 10 people") win over the others.
    3. With none of those, a bare number counts only when nothing around it could give it another meaning: "7",
       "There are 7."
    4. Two numbers that differ, a hedge between two ("7 or 8", "5~6명", "대여섯 명"), a bound ("at least 7", "7명 이상")
       or a decimal is None. "About 7" and "7명 정도" are 7.
    5. More than `LARGEST_COUNT` is a model that repeats a digit, not a count.

    Never raises for a string; an answer is unparsable rather than guessed.
    """
    totals, bound, bare = set(), set(), set()
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    for sentence in re.split(r"(?<=[.!?。])\s+|\n+|(?<=[가-힣]\.)", text):
        if DOUBT.search(sentence):
            continue
        sentence, nobody = NOBODY.subn(" ", NUMBERED_THING.sub(" ", DATE_OR_TIME.sub(" ", sentence)))
        if nobody:
            bound.add(0)
        numbers = _find_numbers(sentence)
        hedged = {
            number
            for left, right in itertools.pairwise(numbers)
            if left.value != right.value and BETWEEN_TWO.search(sentence[left.end : right.start])
            for number in (left, right)
        }
        for number in numbers:
            # What binds a number stands near it; looking no further keeps a long text from taking quadratic time.
            before, after = sentence[max(0, number.start - 100) : number.start], sentence[number.end : number.end + 100]
            unclear = number in hedged or BOUND_BEFORE.search(before) or BOUND_AFTER.search(after)
            value = None if unclear else number.value
            people_after = PEOPLE_AFTER.search(after) or (number.korean and after.lstrip().startswith("분"))
            if people_after or (PEOPLE_BEFORE.search(before) and PHRASE_END.search(after)):
                bound.add(value)
                if TOTAL_BEFORE.search(before) or TOTAL_AFTER.search(after):
                    totals.add(value)
            else:
                year = YEAR.fullmatch(sentence, number.start, number.end)
                alone = len(sentence) <= 100 and not FILLER.sub("", before + " " + after)
                bare.add(value if alone and not year else None)
    stated = totals or bound or bare
    count = stated.pop() if len(stated) == 1 else None
    return count if count is None or count <= LARGEST_COUNT else None


def _find_numbers(sentence: str) -> list[_Number]:
    """All numbers of a lower-case sentence, in order."""
    numbers = []
    for match in NUMBER.finditer(sentence):
        if match["digits"]:
            negative = re.search(r"(?:^|\s)-$", sentence[max(0, match.start() - 2) : match.start()])
            digits = match["digits"].replace(",", "")
            value = None if match["fraction"] or negative or len(digits) > 9 else int(digits)
        elif match["english"]:
            value = _read_english(match["english"])
        else:
            value = None if match["vague"] else _read_korean(re.sub(r"\s", "", match["native"] or match["sino"]))
        korean = not (match["digits"] or match["english"])
        numbers.append(_Number(match.start(), match.end(), value, korean))
    return numbers


def _read_english(words: str) -> int:
    """ "two hundred and twenty-three" -> 223. The pattern has checked the grammar."""
    total = current = 0
    for word in re.findall(r"[a-z]+", words):
        if word == "hundred":
            current *= 100
        elif word == "thousand":
            total, current = 1000 * current, 0
        elif word == "dozen":
            current = 12
        elif word != "and":
            current += 1 if word == "a" else ENGLISH[word]
    return total + current


def _read_korean(word: str) -> int:
    """ "천이백삼십사" -> 1234, "백스물세" -> 123. The pattern has checked the grammar."""
    total = digit = 0
    for part in re.findall(rf"{_native_tens}|{_native_units}|.", word):
        if part in SINO_SCALES:
            total, digit = total + (digit or 1) * SINO_SCALES[part], 0
        elif part in SINO_UNITS:
            digit = SINO_UNITS[part]
        else:
            total += NATIVE_TENS[part] if part in NATIVE_TENS else NATIVE_UNITS[part]
    return total + digit


def find_count_turn(messages: list[dict], count: int) -> int | None:
    """Index of the first assistant message whose text states exactly `count` people, or None when no message does.

    Evaluation asks the conversation up to that message; a row without one is not a counting question.
    """
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and parse_count(message["content"]) == count:
            return index
    return None


def score_counts(predicted: list[int | None], true: list[int]) -> dict:
    """Scores of predicted counts against the true ones, in people; an unparsable prediction is None.

    - `n`: items
    - `mae`, `rmse`, `bias` (mean of predicted minus true): over the parsed predictions, None when there is none
    - `penalised_mae`: over all items; an unparsable answer costs as much as answering 0, so that refusing hard items
      never pays
    - `exact`, `within_1`, `within_2`: shares of all items, from 0 to 1; an unparsable answer is wrong
    - `unparsable_rate`: share of all items

    ValueError when there are no items or the lengths differ.
    """
    if not true or len(predicted) != len(true):
        raise ValueError(
            f"expected as many predictions as true counts, at least one; got {len(predicted)} and {len(true)}"
        )
    errors = [guess - truth for guess, truth in zip(predicted, true, strict=True) if guess is not None]
    penalised = [abs((guess or 0) - truth) for guess, truth in zip(predicted, true, strict=True)]
    n = len(true)
    return {
        "n": n,
        "mae": statistics.fmean(map(abs, errors)) if errors else None,
        "rmse": math.sqrt(statistics.fmean(error**2 for error in errors)) if errors else None,
        "penalised_mae": statistics.fmean(penalised),
        "exact": sum(error == 0 for error in errors) / n,
        "within_1": sum(abs(error) <= 1 for error in errors) / n,
        "within_2": sum(abs(error) <= 2 for error in errors) / n,
        "bias": statistics.fmean(errors) if errors else None,
        "unparsable_rate": (n - len(errors)) / n,
    }


def crowd_sizes(true: list[int], num_sizes: int = 4) -> list[tuple[int, int]]:
    """Ranges of people, both ends included, that cut the items into about equal parts: [(13, 26), (27, 31), ...].

    The cuts are quantiles of the true counts; there are fewer ranges when many items share one count, none is empty.
    """
    if not true:
        raise ValueError("crowd sizes need at least one true count")
    counts = sorted(true)
    highest = sorted({counts[max(0, len(counts) * part // num_sizes - 1)] for part in range(1, num_sizes + 1)})
    lowest = [counts[0], *(min(count for count in counts if count > high) for high in highest[:-1])]
    return list(zip(lowest, highest, strict=True))


def score_by_crowd_size(predicted: list[int | None], true: list[int], sizes: list[tuple[int, int]]) -> list[dict]:
    """`score_counts` within each range of true counts, with the range as `from` and `to`; empty ranges are left out."""
    scores = []
    for low, high in sizes:
        inside = [(guess, truth) for guess, truth in zip(predicted, true, strict=True) if low <= truth <= high]
        if inside:
            scores.append({"from": low, "to": high} | score_counts(*map(list, zip(*inside, strict=True))))
    return scores


def trivial_guesses(train_counts: list[int]) -> dict[str, int]:
    """What one would answer without looking: the `train_median` and `train_mean` of the counts, one per training image.

    Both are whole, as a count of people is: the median is the lower of two middle counts, the mean is rounded half up.
    """
    if not train_counts:
        raise ValueError("the trivial guesses need at least one training count")
    return {
        "train_median": statistics.median_low(train_counts),
        "train_mean": math.floor(statistics.fmean(train_counts) + 0.5),
    }
