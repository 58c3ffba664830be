"""Korean particles that agree with the word before them: 로빈은, 치도리는, 10은, TV는."""

import re
import unicodedata
from functools import cache
from pathlib import Path

import yaml

HANGUL_FIRST, HANGUL_LAST, FINALS_PER_SYLLABLE = ord("가"), ord("힣"), 28
# The order of final consonants in a Hangul syllable is fixed by Unicode (chapter 3.12): 0 is none, 8 is ㄹ.
NO_FINAL, FINAL_RIEUL, OTHER_FINAL = 0, 8, 1

# Sino-Korean readings: 영 일 이 삼 사 오 육 칠 팔 구. A number ending in 0 reads 영, 십, 백, 천, 만 or 억: all close.
DIGIT_FINALS = dict(zip("0123456789", (1, 8, 0, 1, 0, 0, 1, 8, 8, 0), strict=True))
# Letter names that end in a consonant: 엘, 엠, 엔, 알.
LETTER_FINALS = {"L": FINAL_RIEUL, "M": OTHER_FINAL, "N": OTHER_FINAL, "R": FINAL_RIEUL}
# 1 to 10 in Roman numerals, where their Korean and their English reading end alike: 이 and 투, 사 and 포, 오 and 파이브.
ROMAN_FINALS = {"I": None, "II": NO_FINAL, "III": None, "IV": NO_FINAL, "V": NO_FINAL, "VI": None, "VII": OTHER_FINAL}
ROMAN_FINALS |= {"VIII": None, "IX": None, "X": NO_FINAL, "XX": NO_FINAL, "XIII": None}
WORD_LIST = Path(__file__).with_name("korean_finals.yaml")
_syllable = r"(?:(?:[kgsztdnhbpmrwj]|sh|ch|ts|f|[kgnhbpmr]y|y)?[aiueo]|n(?![aiueoy]))"
_not_japanese = r"ti|tu|si(?!h)|hu|zi|di|du|f[aeio]|w[iuoe]|y[ie]"  # as Hepburn spells none
ROMAJI = re.compile(rf"(?!.*(?:{_not_japanese}))(?:k(?=k)|s(?=s)|t(?=[tc])|p(?=p)|c(?=ch)|{_syllable})+")
SPOKEN_SIGNS = {"%": NO_FINAL, "+": NO_FINAL, "℃": NO_FINAL}  # 퍼센트, 플러스, 도
BRACKETED_TAIL = re.compile(r"\s*[(\[（【][^()\[\]（）【】]*[)\]）】]\s*$")


def attach_particle(word: str, after_consonant: str, after_vowel: str) -> str:
    """`word` with the form that agrees with its last sound: `attach_particle("치도리", "은", "는")` is "치도리는".

    A form may begin with closing marks ("’은"). 으로 and 로 follow their own rule: ㄹ counts as a vowel. Where the
    reading cannot be known (Chinese characters, other scripts) both forms are written: "黃金은(는)".
    """
    final = find_final(word)
    if final is None:
        marks = re.match(r"\W*", after_consonant).group()
        return f"{word}{after_consonant}({after_vowel.removeprefix(marks)})"
    if final == FINAL_RIEUL and re.match(r"\W*으로", after_consonant):
        final = NO_FINAL
    return word + (after_vowel if final == NO_FINAL else after_consonant)


def find_final(word: str) -> int | None:
    """Final consonant with which `word` ends when it is read aloud in Korean: 0 none, 8 ㄹ, another number some other
    consonant, None when it cannot be known. Closing marks and a bracketed tail are not read: "가지(만렙)" ends in 지.

    Latin words are read by `find_latin_final`.
    """
    while (shorter := BRACKETED_TAIL.sub("", word)) and shorter != word:
        word = shorter
    word = unicodedata.normalize("NFKC", word)
    end = len(word)
    while end and not (word[end - 1].isalnum() or word[end - 1] in SPOKEN_SIGNS):
        end -= 1
    if not end:
        return None
    last = word[end - 1]
    if last in SPOKEN_SIGNS:
        return SPOKEN_SIGNS[last]
    if HANGUL_FIRST <= ord(last) <= HANGUL_LAST:
        return (ord(last) - HANGUL_FIRST) % FINALS_PER_SYLLABLE
    if last in DIGIT_FINALS:
        return DIGIT_FINALS[last]
    if "ぁ" <= last <= "ヿ":  # kana; the long vowel mark is among them
        return OTHER_FINAL if last in "んン" else NO_FINAL
    latin = re.search(r"[A-Za-z]+$", strip_accents(word[:end].split()[-1]))
    return find_latin_final(latin[0]) if latin else None


def find_latin_final(word: str) -> int | None:
    """Final consonant of a Latin word read in Korean, as `find_final` gives it; None where two readings are in use.

    Capitals without a vowel, and up to three of them, are read letter by letter (TV, OLM): None where they could be a word
    with another ending (AIR). Roman numerals are read in Korean or in English: None where those differ (III: 삼, 쓰리).
    """
    if word in ROMAN_FINALS or re.fullmatch("[A-Z]*III", word):
        return ROMAN_FINALS.get(word)
    spelled = LETTER_FINALS.get(word[-1].upper(), NO_FINAL)
    if len(word) == 1:
        return spelled
    final = final_of_word(word.lower())
    if word.lower() in listed_finals():
        return final
    if not re.search("[aeiouy]", word, re.IGNORECASE):
        return spelled
    return None if word.isupper() and len(word) <= 3 and spelled != final else final


def final_of_word(word: str) -> int | None:
    """By the rules for writing English in Hangul (외래어 표기법 제3장 제1절), which romanised Japanese fits too.

    m, n, ng and l close the syllable, and so do p, t and k after one short vowel (비밥, 북); other endings are given a vowel
    (월드, 러브). A silent e after m and n closes it (타임), but not in Japanese words (하지메). Which words are English, and what
    usage reads otherwise, stands in korean_finals.yaml; None where neither says anything.
    """
    listed = listed_finals()
    if word in listed:
        return listed[word]
    if re.search(r"le?$", word):
        return FINAL_RIEUL
    if re.search(r"(m|n|ng|mb)$", word):
        return OTHER_FINAL
    if re.search(r"[mn]e$", word):
        return NO_FINAL if ROMAJI.fullmatch(word) else OTHER_FINAL
    if re.search(r"[aeiouy](c|ck)$", word) or word.endswith("ship"):
        return OTHER_FINAL
    if re.search(r"([^aeiouy][bptk]|[aeou][aeiou][ptk]|[^bptk])$", word):
        return NO_FINAL
    return None


@cache
def listed_finals() -> dict[str, int | None]:
    """{word: final} of korean_finals.yaml; None for words with two readings."""
    lists = yaml.safe_load(WORD_LIST.read_text(encoding="utf-8"))
    finals = {"closed": OTHER_FINAL, "open": NO_FINAL, "both": None}
    return {word: final for name, final in finals.items() for word in lists[name].split()}


def strip_accents(text: str) -> str:
    """The text without marks above or below its letters."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
