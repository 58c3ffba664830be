"""Reads the number of people out of a written answer, Korean or English.

Standard library only: data preparation checks its labels with the very function that later scores the model. What is
read stands in `count_patterns` as tables; here is what is made of it.
"""

import itertools
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from finetuning.tasks import count_patterns as patterns
from finetuning.tasks.numerals import Numeral, find_numerals

# No picture shows more people than this that anyone could count; one 22222222222 would be the whole mean error.
LARGEST_COUNT = 9_999
REACH = 100  # characters: what binds a number stands near it
MOST_NUMBERS = 50  # an answer with more of them states no single one


@dataclass(eq=False)
class Mention:
    """A number in an answer; `value` None is a range, a bound or a vague word."""

    value: int | None
    kind: str  # "people", "bare" (perhaps people: "20 are walking"), "other" (3 floors)
    sentence: int
    total: bool = False
    part: bool = False  # of a whole that is stated elsewhere
    aboard: bool = False  # "with 19 passengers": a part, or all that is said
    placed: bool = False  # its own clause names a place
    place: bool = False  # the sentence names a place: "12 on the left"
    subgroup: bool = False  # the sentence names a kind of people: men, children
    restates: bool = False  # says the number before it again: "thirty-five (35)"
    plain: bool = False  # nothing around it but fillers: "There are 35 people in view."
    opens: bool = False  # parts are listed next: "35 people: 20 men and ..."
    is_result: bool = False  # "12 + 23 = 35"


@lru_cache(maxsize=65536)  # thousands of answers are few texts
def parse_count(text: str) -> int | None:
    """The number of people that a Korean or English answer states, or None when it does not state exactly one.

    Digits ("7명", "1,024"), English words ("twenty-three people"), Korean numerals, native and Sino-Korean ("스물세 명",
    "이십삼 명"), and Hanja are read. The rules, in order:

    1. A sentence that refuses, doubts or asks ("I cannot tell", "알 수 없습니다") states nothing. Dates, times, ages,
       shares, ordinals and the numbers of frames, rooms and cameras are passed over. "No wait" takes back what came
       before.
    2. A number marked as the total ("총 10명", "10 people in all") wins over its parts, unless a part is larger.
    3. Numbers bound to people ("7 people", "사람 수는 7") and words for nobody ("no one", "아무도 없습니다") come next. Parts
       of a stated whole ("3 of them", "그중 3명") and parts that add up to it are no contradiction.
    4. With none of those, a bare number counts only when nothing around it could give it another meaning: "7".
    5. Two numbers that differ, a hedge between two ("7 or 8", "5~6명", "대여섯 명"), a bound ("at least 7", "7명 이상")
       or a decimal is None. "About 7" and "7명 정도" are 7.
    6. More than `LARGEST_COUNT` is a model that repeats a digit, not a count.

    Never raises for a string; an answer is unparsable rather than guessed.
    """
    mentions: list[Mention] = []
    for index, sentence in enumerate(patterns.SENTENCE_END.split(make_even(text))):
        if correction := list(patterns.CORRECTION.finditer(sentence)):
            mentions.clear()
            sentence = sentence[correction[-1].end() :]
        sentence, nobody = patterns.NOBODY.subn(" ", sentence)
        if nobody:
            mentions.append(Mention(0, "people", index, plain=True))
        if not sentence.rstrip(" )'").endswith("?"):
            mentions += read_sentence(patterns.NO_ONE.sub(" ", sentence), index)
    count = settle(mentions)
    return count if count is None or count <= LARGEST_COUNT else None


def make_even(text: str) -> str:
    """Lower case without markup, one form of hyphens, quotes and spaces; numbers that count no people are gone."""
    text = _substitute(patterns.EVEN, text)
    text = _substitute(patterns.EVEN_AFTER_NFKC, unicodedata.normalize("NFKC", text))
    text = _substitute(patterns.EVEN_LOWER, text.lower())
    if patterns.FIRST_LIST_MARK.search(text):
        text = patterns.LIST_MARK.sub("", text)
    return patterns.DENIED.sub(" ", patterns.NO_COUNT.sub(" ", text))


def _substitute(rules: list[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def read_sentence(sentence: str, index: int) -> list[Mention]:
    """The numbers of one sentence of an even text, or none when the sentence doubts or refuses."""
    numerals = find_numerals(sentence, patterns.NUMERAL)
    if not numerals:
        return []
    if len(numerals) > MOST_NUMBERS:
        return [Mention(None, "people", index)]
    doubt = patterns.DOUBT.search(sentence)
    if (doubt and doubt.start() < numerals[0].start) or patterns.DOUBT_AFTER.search(sentence, numerals[0].end):
        return []
    mentions = [read_number(sentence, numeral, index) for numeral in numerals]
    compare_neighbours(sentence, numerals, mentions)
    mark_uncounted(sentence, numerals, mentions)
    shared_out = patterns.SHARED_OUT.search(sentence)
    ends = [0, *(numeral.end for numeral in numerals)]
    starts = [*(numeral.start for numeral in numerals), len(sentence)]
    residue = " ".join(sentence[end:start] for end, start in zip(ends, starts, strict=True))
    alone = len(sentence) <= 2 * REACH and not patterns.FILLER.sub("", residue)
    place, subgroup = patterns.PLACE.search(sentence), patterns.SUBGROUP.search(sentence)
    for mention, numeral in zip(mentions, numerals, strict=True):
        mention.place, mention.subgroup = bool(place), bool(subgroup)
        mention.plain = alone and not patterns.YEAR.fullmatch(sentence, numeral.start, numeral.end)
        if shared_out and not mention.total and not mention.opens:
            mention.value = None
    return mentions


def read_number(sentence: str, numeral: Numeral, index: int) -> Mention:
    """What the words next to a number make of it."""
    before = sentence[max(0, numeral.start - REACH) : numeral.start]
    after = sentence[numeral.end : numeral.end + REACH]
    honorific = patterns.AFTER_HONORIFIC if numeral.korean else patterns.DIGITS_HONORIFIC
    all_of_them = patterns.ALL.search(before) and patterns.OF_THEM.search(after)
    whole_of_some = patterns.OF_WHOM_AFTER.search(after)
    counted = patterns.AFTER_PEOPLE.search(after) or honorific.search(after) or all_of_them or whole_of_some
    noun = not counted and numeral.korean and patterns.KOREAN_NOUN_AFTER.match(after)
    ends = patterns.PHRASE_END.search(after)
    is_result = bool(patterns.RESULT_BEFORE.search(before))
    total = (patterns.TOTAL_BEFORE.search(before) and (counted or ends)) or patterns.TOTAL_AFTER.search(after)
    total = (total and not patterns.SUM_AFTER.search(after)) or patterns.SUM_BEFORE.search(before)
    labelled = ends and (patterns.BEFORE_PEOPLE.search(before) or patterns.IN_BRACKETS.search(before))
    if counted or noun or (total and not is_result) or labelled:
        kind = "people"
    else:
        thing = patterns.OTHER_THINGS.search(after) or (numeral.value == 1 and patterns.ONE_THING.search(after))
        kind = "other" if thing and not patterns.KOREAN_GOES_ON.search(after) else "bare"
    unclear = (
        patterns.BOUND_BEFORE.search(before)
        or patterns.BOUND_AFTER.search(after)
        or (patterns.GROUPED.search(before) and not patterns.TOTAL_AFTER.search(after))
        or patterns.RANGE_AFTER.search(after)
        or (noun and numeral.value == 1)  # 한 남자 is "a man"
    )
    whole = (counted and patterns.WHOLE_BEFORE.search(before)) or patterns.WHOLE_AFTER.search(after)
    part = patterns.PART_BEFORE.search(before) or patterns.PART_AFTER.search(after)
    return Mention(
        value=None if unclear else numeral.value,
        kind=kind,
        sentence=index,
        total=bool(total),
        part=bool(part and not total and not whole),
        aboard=bool(patterns.WITH.search(before) and patterns.WITH_ANYBODY.search(after)),
        placed=bool(patterns.PLACE.search(re.split("[,.:]", before)[-1] + re.split("[,.:]", after)[0])),
        opens=bool(whole or whole_of_some or patterns.OPENS.search(after)),
        is_result=is_result,
    )


def compare_neighbours(sentence: str, numerals: list[Numeral], mentions: list[Mention]) -> None:
    """Finds ranges ("30 to 35 people"), numbers said again ("thirty-five (35)") and totals that are parts.

    "In total, 12 people on the left and 23 on the right" and "총 7명의 남자와 3명의 여자" state no total.
    """
    for (left, right), (first, second) in zip(itertools.pairwise(numerals), itertools.pairwise(mentions), strict=True):
        between = sentence[left.end : right.start][: 2 * REACH]
        if first.value == second.value and first.value is not None:
            second.restates = bool(patterns.BRACKET.search(between))
        elif is_range(between, first, second):
            first.value = second.value = None
            if "people" in (first.kind, second.kind):
                first.kind = second.kind = "people"
        if first.total and not second.total and not second.part and second.kind != "other":
            named = patterns.PLACE.search(between) or patterns.SUBGROUP_AFTER.search(between)
            if named and patterns.NEXT_PART.search(between):
                first.total, first.value = False, None


def is_range(between: str, first: Mention, second: Mention) -> bool:
    """Whether two numbers are the ends of a range, by what stands between them."""
    if second.total and between.strip() == ",":
        return False  # "A group of 9 and one of 5, 14 people in total"
    if patterns.DASHED.search(between):  # "35 people - 20 men and 15 women" lists parts; a range goes up
        return not second.total and (None in (first.value, second.value) or second.value > first.value)
    # "3 men and 4 women" are two numbers.
    return not patterns.JOINED.search(between) and bool(patterns.BETWEEN_TWO.search(between))


def mark_uncounted(sentence: str, numerals: list[Numeral], mentions: list[Mention]) -> None:
    """ "A man and 3 children" is not 3: a number joined to people without one states no total."""
    if counts_its_list(sentence, numerals):
        for mention in mentions[:-1]:
            mention.part = True
        return
    pairs = list(zip(numerals, mentions, strict=True))
    for match in patterns.UNCOUNTED.finditer(sentence):
        before = [pair for pair in pairs if pair[0].end <= match.start()][-1:]
        after = [pair for pair in pairs if pair[0].start >= match.end()][:1]
        for numeral, mention in before + after:
            is_before = numeral.end <= match.start()
            between = sentence[numeral.end : match.start()] if is_before else sentence[match.end() : numeral.start]
            mention.aboard = False
            joined = len(between) < 60 and patterns.JOINS.search(between)
            if is_before and numeral.value == 1 and patterns.APPOSITION.fullmatch(between):
                continue
            korean = not between or (match[0].endswith(" ") and not is_before and len(between) < 20)
            # "A man pushing 2 children in a cart" has no "and".
            pushed = not is_before and patterns.SUBGROUP_AFTER.match(sentence[numeral.end : numeral.end + REACH])
            if (joined or korean or (pushed and len(between) < 60)) and not mention.total:
                mention.value = None


def counts_its_list(sentence: str, numerals: list[Numeral]) -> bool:
    """Whether the last number counts those named one by one before it: "A man and 10 others: 11 people"."""
    last = numerals[-1]
    listed = len(patterns.ONE_OF_A_LIST.findall(sentence, 0, last.start))
    said = patterns.SAID_OF_A_LIST.search(sentence[max(0, last.start - REACH) : last.start])
    return bool(listed and said) and last.value == listed + sum(numeral.value or 0 for numeral in numerals[:-1])


def settle(mentions: list[Mention]) -> int | None:
    """The one number that the mentions agree on, or None."""
    stated = [mention for mention in mentions if mention.kind != "other" and not mention.part]
    if not stated:
        stated = [mention for mention in mentions if mention.aboard]
    if len(stated) > MOST_NUMBERS:
        return None
    totals = {mention.value for mention in stated if mention.total}
    if totals:
        total = totals.pop() if len(totals) == 1 else None
        exceeded = total is not None and any(mention.value is not None and mention.value > total for mention in stated)
        return None if exceeded else total
    if any(mention.kind == "people" or mention.is_result for mention in stated):
        count = agreed(stated)
        # "One adult with 2 kids": what is not smaller is no part.
        parts = [m.value for m in mentions if m.part and m.kind != "other" and m not in stated]
        return count if count is None or not any(value is not None and value >= count for value in parts) else None
    values = [mention.value for mention in mentions if mention.kind == "bare"]
    if len(values) == len(mentions) > 2 and None not in values and values[-1] == sum(values[:-1]):
        return values[-1]  # "Left: 6. Right: 5. Add: 11."
    plain = all(mention.kind == "bare" and mention.plain and not mention.subgroup for mention in mentions)
    return mentions[0].value if plain and len({mention.value for mention in mentions}) == 1 else None


def agreed(stated: list[Mention]) -> int | None:
    """The number that the mentions agree on: one alone, a whole with its parts, or parts and their sum."""
    distinct: list[Mention] = []
    for mention in stated:
        if not any(said_again(earlier, mention) for earlier in distinct):
            distinct.append(mention)
    values = [mention.value for mention in distinct]
    if len(values) == 1:
        return values[0]
    first, inside = distinct[0], distinct[1:]
    # The whole comes first: "35 people: 20 men and several women", "There are 35 people. 20 are women."
    if first.value is not None and first.kind == "people" and max(value or 0 for value in values[1:]) < first.value:
        listed = first.opens and all(mention.sentence == first.sentence for mention in inside)
        told = first.plain and all(mention.kind == "bare" and not mention.place for mention in inside)
        if listed or (told and None not in values):
            return first.value
    if None in values:
        return None
    # Parts that add up: "20 are walking and 15 are standing, making 35 people".
    if len(values) > 2 and first.value == sum(values[1:]) and not first.placed:
        return first.value
    return values[-1] if len(values) > 2 and values[-1] == sum(values[:-1]) else None


def said_again(earlier: Mention, mention: Mention) -> bool:
    """Whether two equal numbers are one: "12 on the left and 12 on the right" are two."""
    partial = earlier.place or earlier.subgroup or mention.place or mention.subgroup
    other_sentence = mention.sentence != earlier.sentence and not partial
    return mention.value == earlier.value and (mention.restates or mention.value == 0 or other_sentence)
