"""Answers made comparable: case, punctuation, articles, and what Korean adds to the end of a word."""

import re
import string
import unicodedata

HANGUL = re.compile("[가-힣]")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# The copula: 강아지입니다 is "it is a dog". Longer forms first.
COPULA = re.compile(r"(?<=[가-힣\w])(?:입니다|이에요|이예요|예요|에요|이다|이요|이죠|이네요|네요|랍니다|임)$")
AFTER_CONSONANT = ("은", "이", "을", "과", "으로", "이랑")
AFTER_VOWEL = ("는", "가", "를", "와", "로", "랑")
AFTER_ANY = ("에서", "에", "의", "도", "만")


def has_hangul(text: str) -> bool:
    """Whether the text has a Korean letter."""
    return HANGUL.search(text) is not None


def squad_normalise(text: str) -> str:
    """Lower case, without punctuation, English articles and repeated spaces.

    The order is that of SQuAD's evaluation script (Rajpurkar et al., EMNLP 2016).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def normalise(text: str) -> str:
    """An answer in the form in which it is compared: NFKC, `squad_normalise`, and in Korean no spaces, as people differ
    in where they set them."""
    text = squad_normalise(unicodedata.normalize("NFKC", text).casefold().replace("。", "."))
    return text.replace(" ", "") if has_hangul(text) else text


def without_copula(text: str) -> str:
    """강아지입니다 -> 강아지; text that ends otherwise stays."""
    return COPULA.sub("", text)


def answer_forms(answer: str) -> set[str]:
    """Ways to read a normalised answer: as it is, without the copula, without a particle at its end."""
    bare = without_copula(answer)
    return {answer, bare, *(bare[: -len(particle)] for particle in particles_at_end(bare))}


def particles_at_end(text: str) -> list[str]:
    """Particles that may end the text: what is left must end in a Hangul syllable of the fitting kind."""
    found = []
    for group, wants_consonant in ((AFTER_CONSONANT, True), (AFTER_VOWEL, False), (AFTER_ANY, None)):
        for particle in group:
            rest = text.removesuffix(particle)
            if rest == text or not rest or not HANGUL.match(rest[-1]):
                continue
            ends_in_consonant = (ord(rest[-1]) - ord("가")) % 28 != 0
            if wants_consonant is None or wants_consonant == ends_in_consonant:
                found.append(particle)
    return found


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers say the same after normalisation; an answer may end in a particle or in the copula."""
    wanted = normalise(reference)
    return bool(answer_forms(normalise(answer)) & {wanted, without_copula(wanted)})
