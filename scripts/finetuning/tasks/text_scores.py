"""Published scores of an answer against reference answers, each as its own tool defines it."""

import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

from finetuning.tasks.answer_text import has_hangul, squad_normalise

ANLS_THRESHOLD = 0.5
ENOUGH_REFERENCES = 4  # with fewer, no answer could reach a VQA accuracy of 1


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al., ICCV 2019, eq. 1), from 0 to 1.

    The best over the references, in lower case with single spaces; below 0.5 it is 0. The mean over the answers is ANLS.
    """
    said = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        wanted = " ".join(reference.lower().split())
        longest = max(len(said), len(wanted))
        best = max(best, 1 - Levenshtein.distance(said, wanted) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


# The words that the evaluation code of VQA writes as numbers, and the contractions that it puts an apostrophe into.
VQA_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_one_apostrophe = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_more_apostrophes = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""
# Each is found by its spellings that lack one apostrophe.
VQA_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in f"{_one_apostrophe} {_more_apostrophes}".split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def vqa_punctuation(text: str) -> str:
    """A mark beside a space, or any mark in a text with a number such as 1,000, goes; others become spaces."""
    thousands = re.search(r"\d,\d", text) is not None
    result = text
    for mark in VQA_MARKS:
        result = result.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def vqa_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe."""
    words = [VQA_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of VQA (Antol et al., ICCV 2015), from 0 to 1, as its evaluation code computes it.

    Of each reference left out in turn: min(1, others that equal the answer / 3); the mean of these. References are
    compared as they are when all are the same, else without punctuation.
    """
    said = vqa_words(vqa_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))
    if len(set(references)) > 1:
        references = [vqa_punctuation(reference) for reference in references]
    matches = sum(reference == said for reference in references)
    left_out = [min(1.0, (matches - (reference == said)) / 3) for reference in references]
    return sum(left_out) / len(left_out)


def token_f1(answer: str, reference: str) -> float:
    """F1 of shared words of SQuAD (Rajpurkar et al., EMNLP 2016); for a Korean reference of shared letters.

    Letters are KorQuAD's measure (Lim et al., 2019): Korean words carry particles, and would seldom be equal.
    """
    words, wanted = squad_normalise(answer).split(), squad_normalise(reference).split()
    if has_hangul(reference):
        words, wanted = list("".join(words)), list("".join(wanted))
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F of the longest common subsequence (ROUGE-L: Lin, 2004), over words as the package rouge-score cuts them.

    No stemming. For a Korean reference over letters: that package drops all but Latin letters and digits.
    """
    if has_hangul(reference):
        words, wanted = ([letter for letter in text.lower() if letter.isalnum()] for text in (answer, reference))
    else:
        words, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not words or not wanted:
        return 0.0
    return 2 * LCSseq.similarity(words, wanted) / (len(words) + len(wanted))
