"""Korean particles that agree with the word before them: 로빈은, 치도리는, 10은, TV는."""

import re
import unicodedata

HANGUL_FIRST, HANGUL_LAST, FINALS_PER_SYLLABLE = ord("가"), ord("힣"), 28
# The order of final consonants in a Hangul syllable is fixed by Unicode (chapter 3.12): 0 is none, 8 is ㄹ.
NO_FINAL, FINAL_RIEUL, OTHER_FINAL = 0, 8, 1

# Sino-Korean readings: 영 일 이 삼 사 오 육 칠 팔 구. A number ending in 0 reads 영, 십, 백, 천, 만 or 억: all close.
DIGIT_FINALS = dict(zip("0123456789", (1, 8, 0, 1, 0, 0, 1, 8, 8, 0), strict=True))
# Letter names that end in a consonant: 엘, 엠, 엔, 알.
LETTER_FINALS = {"L": FINAL_RIEUL, "M": OTHER_FINAL, "N": OTHER_FINAL, "R": FINAL_RIEUL}
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

    Latin words follow the rules for writing English in Hangul (외래어 표기법 제3장 제1절): m, n, ng and l close the
    syllable, so do p, t and k after a single short vowel (비밥, 북); every other ending is given a vowel (월드, 러브).
    Final e is read as a vowel (아니메), right for romanised Japanese and wrong for an English "Time".
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
    latin = re.search(r"[a-z]+$", strip_accents(word[:end].split()[-1]), re.IGNORECASE)
    if latin is None:
        return None
    if len(latin.group()) == 1 or (
        latin.group().isupper() and len(latin.group()) <= 3
    ):  # read letter by letter: TV, OVA
        return LETTER_FINALS.get(latin.group()[-1].upper(), NO_FINAL)
    if re.search(r"l$", latin.group(), re.IGNORECASE):
        return FINAL_RIEUL
    closed = re.search(r"(m|n|ng|(^|[^aeiou])([aeiou]|oo)(p|t|k|ck))$", latin.group(), re.IGNORECASE)
    return OTHER_FINAL if closed else NO_FINAL


def strip_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
