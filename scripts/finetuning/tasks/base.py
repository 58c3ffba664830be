"""The shape of a task: which rows it can ask and score, how it reads an answer, and what a page shows of it.

A task is one file with one subclass of `Task`; `tasks/exam.py` lists them. Words for people come in pairs, English and
Korean, and `say` picks one.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset

from finetuning.data.pictures import open_picture
from finetuning.evaluation.page import MOST_LISTED, SHOWN, Findings
from finetuning.evaluation.report import Item
from finetuning.evaluation.verdict import Verdict, judge
from finetuning.pages import Say, Table

MODELS = ("base", "tuned")
Question = Mapping[str, Any]
Words = tuple[str, str]  # English, Korean
Questions, Answers, Scores = Sequence[Question], Sequence[str], Sequence[dict[str, float]]
Summary = dict[str, float | int | None]
Trivial = tuple[str, Words]  # an answer, what to call it
COMMONEST: Words = ("commonest in train", "학습 데이터에서 가장 흔함")
LINE_KEYS = ("row", "image_id", "question", "reference", "references")


class Unscorable(ValueError):
    """Why a row cannot be scored; the message is shown to people, beside the row's number."""


@dataclass(frozen=True)
class Measure:
    """One number per answer, averaged over the answers. `key` names it in files; `percent` shows 0.5 as 50 %."""

    key: str
    name: Words
    lower_is_better: bool = False
    percent: bool = True
    unit: Words = ("", "")


@dataclass(frozen=True)
class Asked:
    """Questions of one task that both models were asked, and all that the page needs to know of them.

    `questions` are rows without pictures, `pictures` the same rows with them, looked up by place; `train` are questions
    of the run's own train split, for the trivial answers; `groups` say which questions stand or fall together.
    """

    questions: Sequence[Question]
    pictures: Dataset
    train: Sequence[Question]
    groups: Sequence[Any]
    settings: Mapping[str, Any]
    num_others: int = 0
    bootstrap: Mapping[str, Any] = field(default_factory=dict)


class Task:
    """Base of all tasks. `measures` are those of the verdict; the first one chooses checkpoints and ranks items."""

    name: str
    title: Words
    measures: tuple[Measure, ...]

    def turn(self, row: Question) -> int:
        """Place of the answer in `messages` that is asked for: the first one. Raises Unscorable."""
        messages = row["messages"]
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and place and message["content"].strip():
                self.refuse_reference(messages[place - 1]["content"], message["content"])
                return place
        raise Unscorable("no answer with text follows a question")

    def refuse_reference(self, question: str, reference: str) -> None:
        """Raise Unscorable where a row's own answer is none that this task reads."""

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Numbers of one answer: at least one for each of `measures`, by its key."""
        raise NotImplementedError

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        """What one would answer without looking, read off the train split: key -> (answer, what to call it)."""
        raise NotImplementedError

    def remark(self, question: Question, answer: str, say: Say) -> str:
        """How an answer was understood, for people."""
        raise NotImplementedError

    def scores(self, questions: Questions, answers: Answers) -> list[dict[str, float]]:
        """`score` of each question and its answer."""
        return [self.score(question, answer) for question, answer in zip(questions, answers, strict=True)]

    def summarise(self, scores: Scores) -> Summary:
        """`n`, and the mean of each number of `scores` over the answers that have it."""
        keys = dict.fromkeys(key for score in scores for key in score)
        return {"n": len(scores)} | {key: statistics.fmean(s[key] for s in scores if key in s) for key in keys}

    def metrics(self, questions: Questions, answers: Answers, scores: Scores, train: Questions) -> dict[str, float]:
        """Metrics of an evaluation while training, `<task>_<number>`; beside the first measure, each trivial answer's."""
        first = self.measures[0].key
        summary = self.summarise(scores)
        metrics = {f"{self.name}_{key}": value for key, value in summary.items() if value is not None}
        for key, (answer, _) in self.trivial_answers(train).items():
            trivial = self.scores(questions, [answer] * len(questions))
            metrics[f"{self.name}_{first}_{key}"] = statistics.fmean(score[first] for score in trivial)
        return metrics

    def skill(self, metrics: Mapping[str, float]) -> float:
        """Where `metrics` stand between the best trivial answer (0) and perfect (1); below 0 is worse than not looking.

        The skill score of forecasts (Murphy, Monthly Weather Review 116, 1988), of the first measure. Where no trivial
        answer is known, or one is perfect, minus the distance from perfect.
        """
        measure, trivial = self.measures[0], self.best_trivial(metrics)
        value, perfect = metrics[f"{self.name}_{measure.key}"], 0.0 if measure.lower_is_better else 1.0
        if trivial is None or trivial == perfect:
            return -abs(value - perfect)
        return 1 - (value - perfect) / (trivial - perfect)

    def sentence(self, metrics: Mapping[str, float]) -> str:
        """One sentence on the last evaluation of a training."""
        measure, trivial = self.measures[0], self.best_trivial(metrics)

        def shown(value: float) -> str:
            return (
                f"{value:.1%}" if measure.percent else f"{value:.2f}{' ' if measure.unit[0] else ''}{measure.unit[0]}"
            )

        value = metrics[f"{self.name}_{measure.key}"]
        text = f"{measure.name[0]} {shown(value)} on {metrics[f'{self.name}_n']:.0f} held-out questions"
        if trivial is None:
            return text
        ahead = value < trivial if measure.lower_is_better else value > trivial
        return f"{text}: {'better than' if ahead else 'no better than'} the best trivial answer ({shown(trivial)})"

    def best_trivial(self, metrics: Mapping[str, float]) -> float | None:
        """The best trivial answer's value of the first measure; None where there is none."""
        measure = self.measures[0]
        start = f"{self.name}_{measure.key}_"
        values = [value for key, value in metrics.items() if key.startswith(start)]
        return None if not values else min(values) if measure.lower_is_better else max(values)

    def table(self, questions: Questions, answers: Answers, scores: Scores) -> dict[str, list[Any]]:
        """Columns for the trackers, beside the pictures and the questions: truth, answer, and how good it is."""
        return {
            "truth": [self.truth(question) for question in questions],
            "answer": list(answers),
            "score": [score[self.measures[0].key] for score in scores],
        }

    def caption(self, question: Question, answer: str) -> str:
        """`truth -> answer`, short enough to stand under a thumbnail."""
        return f"{self.truth(question)[:12]} -> {answer[:12]}"

    @property
    def headline(self) -> tuple[str, str]:
        """(metric of the first measure, what to call it), for people who follow a training."""
        return f"{self.name}_{self.measures[0].key}", f"{self.title[0]}, {self.measures[0].name[0]}"

    def is_right(self, score: Mapping[str, float]) -> bool:
        """Whether an answer with this score is entirely right: green, not red, in the trackers' pictures."""
        measure = self.measures[0]
        return score[measure.key] == (0.0 if measure.lower_is_better else 1.0)

    def findings(
        self, asked: Asked, answers: Mapping[str, Sequence[str]], labels: Mapping[str, str], say: Say
    ) -> Findings:
        """Verdict, tables and items, from the scores of each answer."""
        trivial = self.trivial_answers(asked.train)
        names = dict(labels) | {key: say(*words) for key, (_, words) in trivial.items()}
        given = dict(answers) | {key: [answer] * len(asked.questions) for key, (answer, _) in trivial.items()}
        scores = {model: self.scores(asked.questions, texts) for model, texts in given.items()}
        summaries = {model: self.summarise(scores[model]) for model in given}
        called = {key: names[key] for key in trivial}
        return Findings(
            title=say(*self.title),
            asked=describe_questions(asked, say),
            verdicts=[self._judge(measure, scores, asked, called, say) for measure in self.measures],
            metrics={"task": self.name, "not_scored": asked.num_others, "scores": summaries},
            numbers={f"{model}_{key}": value for model in MODELS for key, value in summaries[model].items()},
            lines=[
                {key: question[key] for key in LINE_KEYS if key in question}
                | {model: answers[model][place] for model in MODELS}
                | {f"{model}_scores": scores[model][place] for model in MODELS}
                for place, question in enumerate(asked.questions)
            ],
            tables=[self._score_table(summaries, names, say)],
            item_groups=self.items(asked, answers, scores, say),
            all_items=self.all_items(asked, answers, say),
        )

    def _judge(
        self,
        measure: Measure,
        scores: Mapping[str, list[dict[str, float]]],
        asked: Asked,
        trivial: dict[str, str],
        say: Say,
    ) -> Verdict:
        scale = 100 if measure.percent else 1
        return judge(
            say(*measure.name),
            {model: [scale * score[measure.key] for score in of_model] for model, of_model in scores.items()},
            asked.groups,
            lower_is_better=measure.lower_is_better,
            trivial=trivial,
            unit="%" if measure.percent else say(*measure.unit),
            **asked.bootstrap,
        )

    # Columns of the table of scores: key of `summarise` -> what to call it. All are shares but the `amounts`.
    columns: Mapping[str, Words]
    amounts: tuple[str, ...] = ()
    note: Words = ("", "")

    def _score_table(self, summaries: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], say: Say) -> Table:
        def cell(key: str, value: float | None) -> str:
            return say("none", "없음") if value is None else f"{value:,.2f}" if key in self.amounts else f"{value:.1%}"

        return Table(
            say(f"{self.title[0].capitalize()}: scores", f"{self.title[1]}: 점수"),
            ["", *(say(*words) for words in self.columns.values())],
            [
                [names[model], *(cell(key, summary.get(key)) for key in self.columns)]
                for model, summary in summaries.items()
            ],
            say(*self.note),
        )

    def truth(self, question: Question) -> str:
        """The right answer, for people."""
        return " / ".join(dict.fromkeys(question.get("references") or [question["reference"]]))

    def items(
        self,
        asked: Asked,
        answers: Mapping[str, Sequence[str]],
        scores: Mapping[str, Sequence[Mapping[str, float]]],
        say: Say,
    ) -> dict[str, Sequence[Item]]:
        """The worst, middling and best answers of the tuned model, with their pictures."""
        measure = self.measures[0]
        sign = -1 if measure.lower_is_better else 1
        goodness = {model: [sign * score[measure.key] for score in scores[model]] for model in MODELS}

        def item(place: int) -> Item:
            remarks = [self.remark(asked.questions[place], answers[model][place], say) for model in MODELS]
            picture = first_picture(asked.pictures, place)
            return replace(
                self.item(asked, answers, place), base_remark=remarks[0], tuned_remark=remarks[1], image=picture
            )

        picks = worst_middling_best(goodness, [question["image_id"] for question in asked.questions])
        return {say(*heading): [item(place) for place in places] for heading, places in picks.items()}

    def item(self, asked: Asked, answers: Mapping[str, Sequence[str]], place: int) -> Item:
        """The question in `place` with its truth and both answers, as the page shows it."""
        question = asked.questions[place]
        texts = [question["question"], self.truth(question), answers["base"][place], answers["tuned"][place]]
        return Item(question["image_id"], *texts)

    def all_items(self, asked: Asked, answers: Mapping[str, Sequence[str]], say: Say) -> dict[str, Sequence[Item]]:
        """Every question and answer, or as many as a page can hold, evenly spaced."""
        number = len(asked.questions)
        step = max(1, -(-number // MOST_LISTED))
        places = range(0, number, step)
        heading = say(f"All {number:,} answers", f"답 {number:,}개 모두")
        if step > 1:
            heading = say(
                f"{len(places):,} of {number:,} answers (answers.jsonl has all)",
                f"답 {number:,}개 중 {len(places):,}개 (모두는 answers.jsonl에)",
            )
        return {heading: [self.item(asked, answers, place) for place in places]}


def worst_middling_best(goodness: Mapping[str, Sequence[float]], names: Sequence[Any]) -> dict[Words, list[int]]:
    """Places of the worst, median and best answers of the tuned model, each name once; of equals the most changed first."""
    ranked = sorted(range(len(names)), key=lambda place: (goodness["tuned"][place], -goodness["base"][place]))
    seen: set[Any] = set()
    ranked = [place for place in ranked if not (names[place] in seen or seen.add(names[place]))]
    number = min(SHOWN, max(1, len(ranked) // 3))
    middle = (len(ranked) - number) // 2
    return {
        ("Worst answers", "가장 틀린 답"): ranked[:number],
        ("Middling answers", "중간쯤인 답"): ranked[middle : middle + number],
        ("Best answers", "가장 맞은 답"): ranked[: -number - 1 : -1],
    }


def first_picture(rows: Dataset, place: int) -> Any:
    """The first picture of a row, opened; None for a row without."""
    images = rows[place]["images"] if "images" in rows.column_names else None
    return open_picture(images[0]) if images else None


def describe_questions(asked: Asked, say: Say) -> str:
    """How many questions about how many pictures, of which dataset and split, and what was left out or counts as one."""
    number, settings, others = len(asked.questions), asked.settings, asked.num_others
    images = len({question["image_id"] for question in asked.questions})
    copies = images - len(set(asked.groups))
    return say(
        f"{number:,} about {images:,} pictures of {settings['dataset']}, split {settings['split']}"
        + (f"; {copies:,} of them are near-copies of others, and count as one with those" if copies else "")
        + (f"; {others:,} other rows are not scored" if others else ""),
        f"{settings['dataset']}의 {settings['split']} 스플릿, 사진 {images:,}장에 대한 질문 {number:,}개"
        + (f"; 그중 {copies:,}장은 다른 사진과 거의 같아 하나로 셉니다" if copies else "")
        + (f"; 채점하지 않은 행 {others:,}개" if others else ""),
    )


def always(answer: str, why: Words, *, shown: str | None = None) -> Trivial:
    """A trivial answer and what to call it: `always red (commonest in train)`; `shown` stands for the answer there."""
    shown = shown or answer
    return answer, (f"always {shown} ({why[0]})", f"항상 {shown} ({why[1]})")


def commonest(values: Sequence[Any]) -> Any | None:
    """The value that occurs most often, of equals the first; None of nothing."""
    return Counter(values).most_common(1)[0][0] if values else None
