"""Facts in answers about anime: read back through the very sentences that taught them, and scored field by field."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from datasets import Dataset

LISTS = ("genres", "producers", "studios")
FIELDS = (*LISTS, "episodes", "rating", "score")
SCORE_TOLERANCE = 0.1  # a score that is off by more was not remembered
HIDDEN_STOP = "\ue000"  # private use: in no text
HANGUL = re.compile("[가-힣]")
# A model that was never taught the sentences may still say the fact in its own.
OWN_WORDS = {
    "episodes": re.compile(r"(?P<value>\d[\d,]*)[\s-]*(?:episodes?\b|화|편|부작)", re.IGNORECASE),
    "score": re.compile(r"(?P<value>\d+(?:\.\d+)?)\s*(?:/\s*10\b|out of (?:10|ten)\b|점(?!\s*만점))", re.IGNORECASE),
}

Facts = dict[str, Any]  # field -> frozenset of names in lower case (LISTS), int (episodes), str (rating), float (score)


def load_wording(dataset_name: str) -> dict[str, Any] | None:
    """The sentences that `prepare_anime.py` wrote answers with, from the dataset's manifest; None for other datasets."""
    manifest = Path(dataset_name) / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("wording") if manifest.is_file() else None


def true_facts(row: Mapping[str, Any]) -> Facts:
    """What is known of the row's title; what is unknown is not in it."""
    facts: Facts = {field: frozenset(name.casefold() for name in row[field]) for field in LISTS}
    facts |= {field: row[field] for field in ("episodes", "rating", "score")}
    return {field: value for field, value in facts.items() if value}


def guess_most_common(rows: Dataset) -> Facts:
    """What one would answer without knowing the title: the commonest value of each field, the median score."""
    by_title = dict(zip(rows["anime_id"], (true_facts(row) for row in rows.remove_columns("messages")), strict=True))
    guess: Facts = {}
    for field in FIELDS:
        values = [facts[field] for facts in by_title.values() if field in facts]
        if values:
            guess[field] = statistics.median(values) if field == "score" else Counter(values).most_common(1)[0][0]
    return guess


class FactReader:
    """Reads facts out of answers about titles.

    A fact is looked for in the sentence that teaches it (`wording`), and failing that, in the answer's own words: a
    number of episodes, a score out of 10, or names that `rows` know (genres, companies, ratings). So a model that was
    never taught these sentences is not judged by its style.
    """

    def __init__(self, wording: Mapping[str, Any], rows: Dataset):
        self._asked = {
            kind: {field for clause in wording[kind]["answer"] for field in fields_of(clause)} & set(FIELDS)
            for kind in ("about", "made", "received")
        }
        self._clauses = {
            kind: [compile_clause(clause) for clause in wording[kind]["answer"] if fields_of(clause) & set(FIELDS)]
            for kind in self._asked
        }
        self._last_separator = wording["last_separator"]
        facts = rows.select_columns([*LISTS, "rating"]).to_dict()
        self._names = {field: any_of({name for names in facts[field] for name in names}) for field in LISTS}
        # "feel. and Zexcs": a name's own full stop is no end of a sentence.
        self._dotted = any_of({name for field in LISTS for names in facts[field] for name in names if name[-1] == "."})
        self._names["rating"] = any_of({rating for rating in facts["rating"] if rating})
        self._ratings = {rating.casefold(): rating for rating in facts["rating"] if rating}

    def questions(self, rows: Dataset) -> list[dict[str, Any]]:
        """The rows without their answer: `messages` (ending with the question), `anime_id`, `title`, `kind`,
        `question`, `reference` (the answer that was cut) and `facts` (what the reference states)."""
        return [
            {
                "messages": row["messages"][:-1],
                "anime_id": row["anime_id"],
                "title": row["title"],
                "kind": row["kind"],
                "question": row["messages"][-2]["content"],
                "reference": row["messages"][-1]["content"],
                "facts": {field: fact for field, fact in true_facts(row).items() if field in self._asked[row["kind"]]},
            }
            for row in rows
        ]

    def read(self, kind: str, answer: str) -> Facts:
        """The facts that an answer of this kind states; what it does not state is not in it."""
        text = " ".join(answer.split())
        said: Facts = {}
        sentences = self._dotted.sub(lambda name: name[0].replace(".", HIDDEN_STOP), text)
        for clause in self._clauses[kind]:
            if match := clause.search(sentences):
                for field, value in match.groupdict().items():
                    said.setdefault(field, self._understand(field, value.replace(HIDDEN_STOP, ".")))
        for field in self._asked[kind] - said.keys():
            if field in OWN_WORDS:
                match = OWN_WORDS[field].search(text)
                said[field] = self._understand(field, match["value"]) if match else None
            else:
                named = [name.casefold() for name in self._names[field].findall(text)]
                said[field] = frozenset(named) if field in LISTS else self._ratings[named[0]] if named else None
        return {field: value for field, value in said.items() if value}

    def _understand(self, field: str, text: str) -> Any:
        if field == "episodes":
            return int(text.replace(",", ""))
        if field == "score":
            return float(text)
        if field == "rating":
            return self._ratings.get(text.casefold(), text)
        # A name may hold a comma or an "and": known names are taken out first, what is left over is unknown names.
        known = self._names[field].findall(text)
        rest = self._names[field].sub(",", text).replace(self._last_separator, ",").split(",")
        return frozenset(name.strip().casefold() for name in (*known, *rest) if name.strip())

    def score_answers(
        self, questions: Sequence[Mapping[str, Any]], answers: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """Metrics of `summarise` under `facts_...` and the table for the trackers, for the trainer."""
        scores = [
            score_facts(self.read(question["kind"], answer), question["facts"])
            for question, answer in zip(questions, answers, strict=True)
        ]
        metrics = {f"facts_{name}": value for name, value in summarise(scores).items() if value is not None}
        table = {
            "title": [question["title"] for question in questions],
            "question": [question["question"] for question in questions],
            "truth": [question["reference"] for question in questions],
            "answer": list(answers),
            "right": [share_right(score) for score in scores],
        }
        return metrics, table


def fields_of(clause: str) -> set[str]:
    return {field for _, field, _, _ in Formatter().parse(clause) if field}


def any_of(names: set[str]) -> re.Pattern[str]:
    """Finds each of the names as a whole word, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?!\w)", re.IGNORECASE)


def compile_clause(clause: str) -> re.Pattern[str]:
    """The template of a sentence turned round: its fields become groups."""
    pattern = ""
    for literal, field, forms, _ in Formatter().parse(clause):
        pattern += r"\s+".join(map(re.escape, re.split(r"\s+", literal)))
        if field is None:
            continue
        value = {"episodes": r"\d[\d,]*", "score": r"\d+(?:\.\d+)?"}.get(field, ".+?")
        pattern += f"(?P<{field}>{value})" if field in FIELDS and f"<{field}>" not in pattern else f"(?:{value})"
        if forms:
            first, second = map(re.escape, forms.split("|"))
            # The third form stands after words whose sound is not known: 은(는).
            pattern += (
                rf"(?:{first}\({second}\)|{first}|{second})" if HANGUL.search(forms) else rf"\s+(?:{first}|{second})"
            )
    return re.compile(pattern + r"(?=\s|$)", re.IGNORECASE)


def score_facts(said: Facts, truth: Facts) -> dict[str, float | None]:
    """Each true fact's score: F1 of the genres; 1 or 0 for the exact producers, studios, episodes and rating; the
    absolute error of the score, in points of 10 (None: no score was stated). What is unknown is not scored."""
    scores: dict[str, float | None] = {}
    for field, value in truth.items():
        if field == "genres":
            shared = len(value & said.get(field, frozenset()))
            scores[field] = 2 * shared / (len(value) + len(said.get(field, ())))
        elif field == "score":
            scores[field] = abs(said[field] - value) if field in said else None
        else:
            scores[field] = float(said.get(field) == value)
    return scores


def share_right(scores: Mapping[str, float | None]) -> float | None:
    """Mean over the facts of one answer, from 0 to 1; a score counts as right within 0.1. None when nothing is known."""
    if not scores:
        return None
    return statistics.fmean(
        (value is not None and value <= SCORE_TOLERANCE) if field == "score" else value
        for field, value in scores.items()
    )


def summarise(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float | int | None]:
    """Means over the answers in which a field's truth is known; None where it is known in none.

    `right`: mean of `share_right`; `genres_f1`, `producers_exact`, `studios_exact`, `episodes_exact`, `rating_exact`,
    from 0 to 1; `score_error`: mean absolute error of the stated scores; `score_stated`: share of the answers, among
    those where it is known, that state one; `n`: answers with a known fact.
    """

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    shares = [share for share in map(share_right, scores) if share is not None]
    stated = [score["score"] for score in scores if "score" in score]
    summary: dict[str, float | int | None] = {"n": len(shares), "right": mean(shares)}
    for field in (*LISTS, "episodes", "rating"):
        name = f"{field}_f1" if field == "genres" else f"{field}_exact"
        summary[name] = mean([score[field] for score in scores if field in score])
    summary["score_error"] = mean([error for error in stated if error is not None])
    summary["score_stated"] = mean([float(error is not None) for error in stated])
    return summary
