"""Facts in answers about anime: read back through the very sentences that taught them, and scored field by field."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict

from finetuning.data.dataset import open_split, spread
from finetuning.evaluation.page import SHOWN, Findings
from finetuning.evaluation.perplexity import AnswerLoss, perplexity
from finetuning.evaluation.plots import Picture, draw
from finetuning.evaluation.report import Item, Plot
from finetuning.evaluation.verdict import Verdict, judge
from finetuning.pages import AnswerTable, Say, Table
from finetuning.tasks.base import MODELS

SPLITS = {  # split -> what its titles are
    "test": ("taught titles", "배운 작품"),
    "validation": ("titles never taught", "배우지 않은 작품"),
}
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

Scores = dict[str, float | None]
Facts = dict[str, Any]  # field -> frozenset of names in lower case (LISTS), int (episodes), str (rating), float (score)


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
        first_words = {
            kind: [clause.partition("{")[0].strip() for clause in wording[kind]["answer"]] for kind in self._asked
        }
        self._sentence_starts = {
            kind: "|".join(re.escape(words) for words in starts if words) or "(?!)"
            for kind, starts in first_words.items()
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
        # "by feel. It has 12 episodes": there it ends the sentence too, and none follows it.
        ending = rf"{HIDDEN_STOP}(?=$|\s+(?:{self._sentence_starts[kind]}))"
        sentences = re.sub(ending, f"{HIDDEN_STOP}.", sentences)
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

    def score(self, questions: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[Scores]:
        """`score_facts` of each answer against what its question's title is known for."""
        return [
            score_facts(self.read(question["kind"], answer), question["facts"])
            for question, answer in zip(questions, answers, strict=True)
        ]


class AnimeExam:
    """What a training is asked about titles that it is taught: on titles never taught, a model can only guess."""

    headlines: ClassVar[dict[str, str]] = {"facts_right": "facts right"}

    def __init__(self, reader: FactReader, train_rows: Dataset, limit: int):
        self.reader = reader
        self.questions = reader.questions(spread(train_rows, limit))
        self.guess = guess_most_common(train_rows)

    def score_distributions(self, model: Any, processing_class: Any, batch_size: int) -> dict[str, float]:
        """No fact is a count, so there is none: {}."""
        return {}

    def score(self, answers: Sequence[str]) -> tuple[dict[str, float], AnswerTable]:
        """Metrics of `summarise` under `facts_...`, `score` (0: as the commonest values, 1: all right), and the table."""
        scores = self.reader.score(self.questions, answers)
        shares = [share_right(score) for score in scores]
        summary = summarise(scores)
        guessed = summarise([score_facts(self.guess, question["facts"]) for question in self.questions])["right"]
        metrics = {f"facts_{name}": value for name, value in summary.items() if value is not None}
        if summary["right"] is not None:
            metrics["facts_right_guess"] = guessed
            metrics["score"] = summary["right"] - 1 if guessed == 1 else (summary["right"] - guessed) / (1 - guessed)
        columns = {
            "title": [question["title"] for question in self.questions],
            "question": [question["question"] for question in self.questions],
            "truth": [question["reference"] for question in self.questions],
            "answer": list(answers),
            "right": shares,
        }
        captions = [(question["title"], share == 1) for question, share in zip(self.questions, shares, strict=True)]
        return metrics, AnswerTable(columns, captions)

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The last evaluation while training, in a sentence."""
        if "eval_facts_right" not in metrics:
            return "no answer was scored while training"
        right, guess = metrics["eval_facts_right"], metrics["eval_facts_right_guess"]
        comparison = "better than" if right > guess else "no better than"
        return f"{right:.1%} of the facts right: {comparison} always the commonest value ({guess:.1%})"


def fields_of(clause: str) -> set[str]:
    """Names of the fields of a clause."""
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


class TitlesExam:
    """The questions of an evaluation: about taught titles (split `test`) and titles never taught (`validation`)."""

    def __init__(self, dataset: DatasetDict, wording: Mapping[str, Any], name: str, limit: int | None):
        train = open_split(dataset, "train", name)
        self.reader = FactReader(wording, train)
        self.guess = guess_most_common(train)
        self.questions: list[dict[str, Any]] = []
        for split in SPLITS:
            rows = open_split(dataset, split, name)
            rows = rows if limit is None else spread(rows, limit)
            self.questions += [question | {"split": split} for question in self.reader.questions(rows)]

    def find(
        self,
        answers: Mapping[str, Sequence[str]],
        losses: Mapping[str, Sequence[AnswerLoss]] | None,
        dataset_name: str,
        labels: Mapping[str, str],
        say: Say,
    ) -> Findings:
        """What both models know of the titles of both splits; with `losses` also how surprised they are by the truth."""
        return find(self.questions, answers, losses, self.reader, self.guess, dataset_name, labels, say)


def find(
    questions: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[str]],
    losses: Mapping[str, Sequence[AnswerLoss]] | None,
    reader: FactReader,
    guess: Facts,
    dataset_name: str,
    labels: Mapping[str, str],
    say: Say,
) -> Findings:
    """The findings of both splits: facts right and, with `losses`, the loss of the true answers."""
    scored = {model: reader.score(questions, answers[model]) for model in MODELS}
    scored["guess"] = [score_facts(guess, question["facts"]) for question in questions]
    places = {split: [i for i, question in enumerate(questions) if question["split"] == split] for split in SPLITS}
    summaries: dict[str, dict[str, Any]] = {}
    for split, chosen in places.items():
        summaries[split] = {model: summarise([scores[i] for i in chosen]) for model, scores in scored.items()}
        for model in MODELS if losses else ():
            summaries[split][model]["perplexity"] = perplexity([losses[model][i] for i in chosen])
    num_titles = {split: len({questions[i]["title"] for i in chosen}) for split, chosen in places.items()}
    plots = {
        f"facts_{name}.png": Plot(
            say(f"Facts right: {SPLITS[split][0]}", f"맞은 사실: {SPLITS[split][1]}"),
            right_by_field(summaries[split]),
            say(
                "F1 for genres, share exactly right for the rest. The guess is the commonest value of each field.",
                "장르는 F1, 나머지는 정확히 맞은 비율입니다. 추측은 항목마다 가장 흔한 값입니다.",
            ),
        )
        for name, split in (("taught", "test"), ("never_taught", "validation"))
    }
    return Findings(
        title=say("facts about titles", "작품에 대한 사실"),
        asked=", ".join(
            say(
                f"{len(places[split]):,} about {num_titles[split]:,} {words[0]}",
                f"{words[1]} {num_titles[split]:,}편에 대한 질문 {len(places[split]):,}개",
            )
            for split, words in SPLITS.items()
        )
        + say(f", from {dataset_name}", f" ({dataset_name})"),
        verdicts=judge_facts(questions, scored, losses, places, say),
        metrics={"task": "anime_facts", "scores": summaries},
        numbers={
            f"{split}_{model}_{key}": summaries[split][model][key]
            for split in SPLITS
            for model in MODELS
            for key in ("right", "perplexity")
            if key in summaries[split][model]
        },
        lines=[
            {key: question[key] for key in ("split", "anime_id", "title", "kind", "question", "reference")}
            | {model: answers[model][i] for model in MODELS}
            | {f"{model}_scores": scored[model][i] for model in MODELS}
            for i, question in enumerate(questions)
        ],
        tables=[fact_table(say(*SPLITS[split]), summaries[split], labels, say) for split in SPLITS],
        plots=list(plots.values()),
        pictures={name: plot.picture.light for name, plot in plots.items()},
        item_groups=items_to_look_at(questions, answers, scored, places, say),
    )


def judge_facts(
    questions: Sequence[Mapping[str, Any]],
    scored: Mapping[str, Sequence[Scores]],
    losses: Mapping[str, Sequence[AnswerLoss]] | None,
    places: Mapping[str, Sequence[int]],
    say: Say,
) -> list[Verdict]:
    """Verdicts on the share of right facts and on perplexity, titles being the clusters."""
    verdicts = []
    grouped_by = say("titles", "작품")
    for split, chosen in places.items():
        known = [i for i in chosen if scored["tuned"][i]]
        verdicts.append(
            judge(
                say(f"facts right about {SPLITS[split][0]}", f"{SPLITS[split][1]}에 대해 맞은 사실"),
                {model: [100 * share_right(scores[i]) for i in known] for model, scores in scored.items()},
                [questions[i]["title"] for i in known],
                lower_is_better=False,
                unit="%",
                grouped_by=grouped_by,
                trivial={"guess": say("always the commonest value", "항상 가장 흔한 값")},
            )
        )
    for split, chosen in places.items() if losses else ():
        verdicts.append(
            judge(
                say(
                    f"loss per token of answers about {SPLITS[split][0]}", f"{SPLITS[split][1]}에 대한 답의 토큰당 손실"
                ),
                {model: [losses[model][i].total / losses[model][i].num_tokens for i in chosen] for model in MODELS},
                [questions[i]["title"] for i in chosen],
                lower_is_better=True,
                grouped_by=grouped_by,
                trivial={},
            )
        )
    return verdicts


def fact_table(what: str, summaries: dict[str, dict[str, Any]], labels: Mapping[str, str], say: Say) -> Table:
    """Share right, F1 and error of each fact, for each model and the commonest value."""

    def share(value: float | None) -> str:
        return say("none", "없음") if value is None else f"{value:.1%}"

    def number(value: float | None) -> str:
        return say("none", "없음") if value is None or math.isinf(value) else f"{value:,.2f}"

    names = dict(labels) | {"guess": say("commonest value", "가장 흔한 값")}
    return Table(
        say(f"Facts: {what}", f"사실: {what}"),
        [
            "",
            say("right", "맞음"),
            say("genres F1", "장르 F1"),
            say("producers", "제작사"),
            say("studios", "스튜디오"),
            say("episodes", "화수"),
            say("rating", "등급"),
            say("score off by", "평점 오차"),
            say("score stated", "평점을 말함"),
            "perplexity",
        ],
        [
            [
                names[model],
                share(part["right"]),
                *(
                    share(part[f"{field}_f1" if field == "genres" else f"{field}_exact"])
                    for field in (*LISTS, "episodes", "rating")
                ),
                number(part["score_error"]),
                share(part["score_stated"]),
                number(part.get("perplexity")),
            ]
            for model, part in summaries.items()
        ],
        say(
            "Right: mean over the facts that an answer should state, the score right within 0.1. Producers and studios are "
            "right when all are named and no other. Perplexity is that of the true answers.",
            "맞음: 답이 말해야 할 사실에 대한 평균이며, 평점은 0.1 안이면 맞습니다. 제작사와 스튜디오는 빠짐없이, 다른 이름 없이 말해야 "
            "맞습니다. perplexity는 정답 문장의 값입니다.",
        ),
    )


def right_by_field(summaries: dict[str, dict[str, Any]]) -> Picture:
    """Bars for each field: base, tuned, and the commonest value."""
    fields = [*LISTS, "episodes", "rating"]

    def plot(figure, colours) -> None:
        axes = figure.subplots()
        for number, (model, label) in enumerate((("base", "base"), ("tuned", "tuned"), ("guess", "commonest value"))):
            shares = [summaries[model][f"{field}_f1" if field == "genres" else f"{field}_exact"] for field in fields]
            places = [place + (number - 1) * 0.27 for place in range(len(fields))]
            colour = colours["reference" if model == "guess" else model]
            axes.bar(places, [100 * (value or 0) for value in shares], 0.25, color=colour, label=label)
        axes.set_xticks(range(len(fields)), fields)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 118)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("right, %")
        axes.legend(loc="upper center", ncols=3)

    return draw(plot)


def items_to_look_at(
    questions: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[str]],
    scored: Mapping[str, Sequence[Scores]],
    places: Mapping[str, Sequence[int]],
    say: Say,
) -> dict[str, list[Item]]:
    """The best, middling and worst answers about taught titles, and some about titles never taught; a title once."""

    def remark(scores: Scores) -> str:
        return ", ".join(
            f"{field}: {say('not stated', '말하지 않음') if value is None else say(f'off by {value:.2f}', f'{value:.2f} 틀림') if field == 'score' else f'{value:.0%}'}"
            for field, value in scores.items()
        )

    def item(i: int) -> Item:
        return Item(
            name=questions[i]["title"],
            question=questions[i]["question"],
            truth=questions[i]["reference"],
            base=answers["base"][i],
            tuned=answers["tuned"][i],
            base_remark=remark(scored["base"][i]),
            tuned_remark=remark(scored["tuned"][i]),
        )

    def ranked(split: str) -> list[int]:
        known = [i for i in places[split] if scored["tuned"][i]]
        known.sort(key=lambda i: (-share_right(scored["tuned"][i]), share_right(scored["base"][i])))
        seen: set[str] = set()
        return [i for i in known if not (questions[i]["title"] in seen or seen.add(questions[i]["title"]))]

    taught, unseen = ranked("test"), ranked("validation")
    number = min(SHOWN, max(1, len(taught) // 3))
    middle = (len(taught) - number) // 2
    picks = {
        say("Taught titles: best answers", "배운 작품: 가장 맞은 답"): taught[:number],
        say("Taught titles: middling answers", "배운 작품: 중간쯤인 답"): taught[middle : middle + number],
        say("Taught titles: worst answers", "배운 작품: 가장 틀린 답"): taught[: -number - 1 : -1],
        say("Titles never taught: from best to worst", "배우지 않은 작품: 맞은 답부터 틀린 답까지"): unseen[
            :: max(1, len(unseen) // SHOWN)
        ][:SHOWN],
    }
    return {heading: [item(i) for i in chosen] for heading, chosen in picks.items()}
