"""The words around the facts: templates from a YAML file, checked as a whole and filled in clause by clause."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from preparing.korean_particles import attach_particle

FIELDS = (
    "title",
    "also_known_as",
    "genres",
    "synopsis",
    "producers",
    "studios",
    "episodes",
    "rating",
    "score",
    "scored_by",
)
KINDS = ("about", "made", "received")
KIND_KEYS = {"train_questions", "test_questions", "answer"}
HANGUL = re.compile("[ㄱ-ㅎ가-힣]")


class Value(str):
    """A fact as it stands in a sentence; `format` picks the form that agrees with it.

    `{title:은|는}` attaches a Korean particle; `{episodes:episode|episodes}` adds the noun in singular or plural,
    after a space, by `number` (of things counted, or of names in a list).
    """

    number: int

    def __new__(cls, text: str, number: int = 1):
        value = super().__new__(cls, text)
        value.number = number
        return value

    def __format__(self, forms: str) -> str:
        if not forms:
            return str(self)
        first, second = forms.split("|")
        if HANGUL.search(forms):
            return attach_particle(str(self), first, second)
        return f"{self} {first if self.number == 1 else second}"


def load_wording(path: Path) -> dict[str, Any]:
    """Reads and checks a wording file. Raises ValueError listing every mistake in it."""
    try:
        wording = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file in UTF-8: {error}") from None
    if problems := find_wording_problems(wording):
        raise ValueError(f"{path}: correct the following:\n  " + "\n  ".join(problems))
    return wording


def find_wording_problems(wording: object) -> list[str]:
    """One sentence per mistake; empty when the wording can be used."""
    if not isinstance(wording, dict):
        return [f"expected a mapping with the keys {', '.join(KINDS)}, got {type(wording).__name__}"]
    problems = [f"unknown key {key!r}" for key in wording if key not in {*KINDS, "last_separator", "values"}]
    if not isinstance(wording.get("last_separator"), str):
        problems.append('last_separator: expected the text before the last name of a list, such as " and "')
    values = wording.get("values", {})
    if not isinstance(values, dict):
        problems.append("values: expected a mapping from field to {value: its wording}")
        values = {}
    for field, words in values.items():
        if field not in {"genres", "rating"}:
            problems.append(f"values.{field}: only genres and rating can be reworded")
        elif not isinstance(words, dict) or not all(isinstance(w, str) for pair in words.items() for w in pair):
            problems.append(f"values.{field}: expected text for text")
    for kind in KINDS:
        section = wording.get(kind)
        if not isinstance(section, dict):
            problems.append(f"{kind}: missing; expected train_questions, test_questions and answer")
            continue
        problems += [f"{kind}: unknown key {key!r}" for key in section if key not in KIND_KEYS]
        for key in sorted(KIND_KEYS):
            templates = section.get(key)
            if not isinstance(templates, list) or not templates:
                problems.append(f"{kind}.{key}: expected a list with at least one text")
                continue
            for number, template in enumerate(templates, start=1):
                where = f"{kind}.{key}, item {number}"
                problems += [f"{where}: {problem}" for problem in find_template_problems(template)]
                if key != "answer" and isinstance(template, str) and "{title" not in template:
                    problems.append(f"{where}: does not name the {{title}}: {template!r}")
        taught, kept = (section.get(key) for key in ("train_questions", "test_questions"))
        if isinstance(taught, list) and isinstance(kept, list):
            for question in kept:
                if question in taught:
                    problems.append(f"{kind}: {question!r} is in train_questions and in test_questions")
    return problems


def find_template_problems(template: object) -> list[str]:
    """What is wrong with a template, in words; empty where nothing is."""
    if not isinstance(template, str):
        return [f"expected text, got {template!r} (put it in quotes)"]
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return [f"{error} in {template!r} (a brace itself is written twice)"]
    problems = []
    for _, field, forms, conversion in parts:
        if field is None:
            continue
        if field not in FIELDS or conversion:
            problems.append(f"unknown field {{{field}}} in {template!r}; there are {', '.join(FIELDS)}")
        if forms and forms.count("|") != 1:
            problems.append(f"{{{field}:{forms}}}: expected two forms such as episode|episodes or 은|는")
    return problems


@cache
def fields_of(template: str) -> frozenset[str]:
    """Names of the fields that a template is filled in with."""
    return frozenset(field for _, field, _, _ in Formatter().parse(template) if field)


def join_names(names: list[str], last_separator: str) -> Value:
    """ "Action, Drama and Sports" (with last_separator " and "); its `number` is how many names there are."""
    head, last = names[:-1], names[-1]
    return Value(last_separator.join([", ".join(head), last]) if head else last, number=len(names))


def write_answer(clauses: list[str], values: Mapping[str, Value]) -> str | None:
    """The clauses whose fields are all known, one after the other; None when nothing but the title would be said."""
    known = [clause for clause in clauses if fields_of(clause) <= values.keys()]
    if not any(fields_of(clause) - {"title"} for clause in known):
        return None
    return " ".join(fill_in(clause, values) for clause in known)


def fill_in(clause: str, values: Mapping[str, Value]) -> str:
    """Like str.format_map, but a name's own full stop ends the sentence too: "by A.C.G.T." and not "A.C.G.T.."."""
    text = ""
    for literal, name, forms, _ in Formatter().parse(clause):
        text += literal.removeprefix(".") if text.endswith(".") else literal
        if name is not None:
            text += format(values[name], forms)
    return text
