"""Numerals in running text: digits, English, native and Sino-Korean words, Hanja. Standard library only."""

import re
from typing import NamedTuple

ENGLISH = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fourty": 40,
    "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
ENGLISH_SCALES = {"dozen": 12, "score": 20, "hundred": 100, "thousand": 1000}
ENGLISH_GROUPS = {"single": 1, "lone": 1, "solitary": 1, "duo": 2, "trio": 3, "quartet": 4}
NATIVE_TENS = {
    "열": 10, "스물": 20, "스무": 20, "서른": 30, "마흔": 40, "쉰": 50, "예순": 60, "일흔": 70, "여든": 80, "아흔": 90,
}  # fmt: skip
NATIVE_UNITS = {
    "하나": 1, "한": 1, "둘": 2, "두": 2, "셋": 3, "세": 3, "석": 3, "넷": 4, "네": 4, "넉": 4,
    "다섯": 5, "여섯": 6, "일곱": 7, "여덟": 8, "아홉": 9,
}  # fmt: skip
SINO_UNITS = {"일": 1, "이": 2, "삼": 3, "사": 4, "오": 5, "육": 6, "륙": 6, "칠": 7, "팔": 8, "구": 9}
SINO_SCALES = {"십": 10, "백": 100, "천": 1000, "만": 10_000}
HANJA = str.maketrans("一二三四五六七八九十百千萬万", "일이삼사오육칠팔구십백천만만")

# "One or two" to "eight or nine", and other words for no exact number.
VAGUE_NATIVE = (
    "한두|두세|두서너|서너|너댓|너덧|네댓|네다섯|네다서|대여섯|대엿|댓|예닐곱|일고여덟|일곱여덟|여덟아홉|엳아홉"
    "|두어|서넛|두엇|여남은|남은"
)
VAGUE_ENGLISH = "several|(?:a\\s)?few|many|some|a\\scouple(?:\\sof)?|couple"

_units = "|".join(word for word, value in ENGLISH.items() if 1 <= value <= 9)
_teens = "|".join(word for word, value in ENGLISH.items() if 10 <= value <= 19)
_tens = "|".join(word for word, value in ENGLISH.items() if value >= 20)
_below_100 = rf"(?:(?:{_tens})(?:(?:\s?-\s?|\s)(?:{_units})\b)?|{_teens}|{_units}|zero)"
_below_1000 = rf"(?:(?:an?|one|{_units})\s?hundred(?:\s(?:and\s)?{_below_100})?|{_below_100})"
_thousands = rf"(?:a|{_below_1000})\sthousand(?:,?\s(?:and\s)?{_below_1000})?"
_native_tens, _native_units = "|".join(NATIVE_TENS), "|".join(NATIVE_UNITS)
_native_words = "하나|둘|셋|넷|다섯|여섯|일곱|여덟|아홉"  # not before a noun, not parts of common words
_digit = f"[{''.join(SINO_UNITS)}]"
_hundreds = rf"(?:(?:{_digit}?만\s?)?(?:{_digit}?천\s?)?(?:{_digit}?백\s?)?)"

DIGITS = r"(?P<digits>(?<![a-z_\d.])(?<![a-z]-)(?:\d{1,3}(?:,\d{3})+(?![,\d])|\d+)(?P<fraction>\.\d+)?)"
SCALED = (
    rf"(?:{DIGITS}(?:\s?-?(?P<scale>dozen|score|hundred|thousand)\b|(?P<sino_scale>\s?[십백천만](?![가-힣]*대\b)))?)"
)
ENGLISH_WORDS = (
    rf"(?P<vague_english>\b(?:{VAGUE_ENGLISH}|a\sgood)\s(?:dozen|hundred|thousand|score)\b)"
    rf"|(?P<half>\bhalf[\s-](?:a[\s-])?dozen\b)"
    rf"|(?P<dozens>\b(?:(?:(?:an?|{_below_100})\s)?dozen|(?:a\sscore(?=\sof\b)|{_below_100}\sscore))\b)"
    rf"|(?P<group>\ba\s(?:(?:duo|trio|quartet)(?=\sof\b)|(?:single|lone|solitary)\b))"
    rf"|(?P<english>\b(?:{_thousands}|{_below_1000}|hundred)\b)"
)
NATIVE = rf"(?P<native>{_hundreds}(?:(?:{_native_tens})\s?(?:{_native_units})?|{_native_units}))"
SINO = rf"(?P<sino>(?={_digit}|[십백천만]){_hundreds}(?:{_digit}?십\s?)?{_digit}*(?<!\s))(?<=[일이삼사오육륙칠팔구십백천만])"
SINO_WITH_NATIVE = rf"(?P<mixed>{_hundreds}{_digit}?십\s?(?:{_native_units}))"


class Numeral(NamedTuple):
    start: int
    end: int
    value: int | None  # None: a decimal, a negative or absurd number, or a vague word such as 두세 (two or three)
    korean: bool  # written in Hangul or Hanja


def numeral_pattern(counter: str, formal: str, honorific: str) -> re.Pattern:
    """The pattern of all numerals; `counter`, `formal` (명) and `honorific` (분) are the Korean words that may follow.

    Sino-Korean numerals take a formal counter alone: 이 사람 is "this person".

    Korean numerals are also parts of other words (이 사진 "this picture", 네 "yes", 열린 "open"). They count before a
    counter, as the first of a pair (일곱이나 여덟 명), or as nouns of their own (둘입니다).
    """
    follows = rf"(?=\s?(?:{counter}|{honorific})|(?:이나|에서|,)?\s?(?:{_native_tens}|{_native_units}))"
    noun_ends = (
        r"(?=\s?(?:입니다|입니당|이다|이에요|예요|이요|요|이고|이며|이네요|이죠|정도|쯤|가량|이\s|은\s|과\s|도\s|이서"
        r"|\s(?:있[습어]|보[입여]|계[십세])|$|[.,!)}\]~]))"
    )
    noun = rf"(?:(?<=둘)|(?<=셋)|(?<=넷)|(?<=[가-힣]{{2}})){noun_ends}"
    vague_sino = rf"(?:{_hundreds}(?:{_digit}?십\s?)?(?:일이|이삼|삼사|사오|오륙|육칠|칠팔|팔구)(?:십|백|천)?)"
    korean = (
        rf"(?:(?<![가-힣])|(?<=[총약])|(?<=모두)|(?<=전부)|(?<=대략)|(?<=합계))(?:"
        rf"(?P<vague>(?:(?:{_hundreds}(?:{_native_tens})?\s?(?:{VAGUE_NATIVE}))|{vague_sino}|십수|[몇수](?:십|백|천))"
        rf"(?=\s?(?:{counter}|{honorific})))"
        rf"|{SINO_WITH_NATIVE}(?=\s?{formal})"
        rf"|{NATIVE}(?:{follows}|{noun})|{SINO}(?:(?=\s?{formal})"
        rf"|(?:(?<=[십백천])|(?<=[십백천]{_digit}))(?=\s?(?:에서|부터|내지|이나|또는|혹은)\s))"
        rf"|(?P<zero>[영공](?=\s?명)|제로(?=\s?명)))"
    )
    return re.compile(f"{SCALED}|{ENGLISH_WORDS}|{korean}")


# A whole answer in Sino-Korean numerals without a counter: 삼십오, 삼십오입니다.
SINO_ALONE = re.compile(
    rf"\s*(?P<sino>(?=[가-힣]{{2}}){_hundreds}(?:{_digit}?십)?{_digit}?)(?=\s?(?:입니다|이요|요|$|[.!]))"
)


def find_numerals(text: str, pattern: re.Pattern) -> list[Numeral]:
    """All numerals of a lower-case text, in order; `pattern` is from `numeral_pattern`."""
    text = text.translate(HANJA)
    numerals = [Numeral(*match.span(), _value(match, text), _is_korean(match)) for match in pattern.finditer(text)]
    if not numerals and (match := SINO_ALONE.match(text)) and re.search("[십백천]", match["sino"]):
        numerals.append(Numeral(*match.span("sino"), read_korean(match["sino"]), True))
    return numerals


def _is_korean(match: re.Match) -> bool:
    return any(match[kind] for kind in ("vague", "mixed", "native", "sino", "zero"))


def _value(match: re.Match, text: str) -> int | None:
    if match["digits"]:
        negative = re.search(r"(?:^|\s)-$", text[max(0, match.start() - 2) : match.start()])
        digits = match["digits"].replace(",", "")
        fraction = match["fraction"] and match["fraction"].strip(".0")
        if fraction or negative or len(digits.split(".")[0]) > 9:
            return None
        scale = ENGLISH_SCALES[match["scale"]] if match["scale"] else 1
        if match["sino_scale"]:
            scale = SINO_SCALES[match["sino_scale"].strip()]
        return int(float(digits)) * scale
    if match["english"]:
        return read_english(match["english"])
    if match["dozens"]:
        words = re.findall("[a-z]+", match["dozens"])
        times = 1 if words[:-1] in ([], ["a"], ["an"]) else read_english(" ".join(words[:-1]))
        return times * ENGLISH_SCALES[words[-1]]
    if match["group"]:
        return ENGLISH_GROUPS[match["group"].split()[-1]]
    if match["half"]:
        return 6
    if match["native"]:
        return read_korean(match["native"])
    if match["sino"]:
        return read_korean(match["sino"])
    return 0 if match["zero"] else None


def read_english(words: str) -> int:
    """ "two hundred and twenty-three" -> 223. The pattern has checked the grammar."""
    total = current = 0
    for word in re.findall(r"[a-z]+", words):
        if word == "hundred":
            current = 100 * (current or 1)
        elif word == "thousand":
            total, current = 1000 * current, 0
        elif word != "and":
            current += 1 if word in ("a", "an") else ENGLISH[word]
    return total + current


def read_korean(word: str) -> int | None:
    """ "천이백삼십사" -> 1234, "백스물세" -> 123; None for digits read one by one (삼오)."""
    total = digit = 0
    for part in re.findall(rf"{_native_tens}|{_native_units}|[^\s]", word):
        if part in SINO_SCALES:
            total, digit = total + (digit or 1) * SINO_SCALES[part], 0
        elif part in SINO_UNITS:
            if digit:
                return None
            digit = SINO_UNITS[part]
        else:
            total += NATIVE_TENS[part] if part in NATIVE_TENS else NATIVE_UNITS[part]
    return total + digit
