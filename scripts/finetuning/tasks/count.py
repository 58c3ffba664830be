"""The task `count`: how many people a picture shows."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from finetuning.evaluation.page import Findings
from finetuning.evaluation.plots import error_by_crowd_size, predicted_against_true
from finetuning.evaluation.report import Plot
from finetuning.evaluation.verdict import judge
from finetuning.pages import Say, Table
from finetuning.tasks.base import (
    MODELS,
    Answers,
    Asked,
    Measure,
    Question,
    Questions,
    Scores,
    Task,
    Trivial,
    Unscorable,
    always,
    describe_questions,
)
from finetuning.tasks.count_parser import parse_count
from finetuning.tasks.count_scores import (
    crowd_sizes,
    find_count_turn,
    score_by_crowd_size,
    score_counts,
    trivial_guesses,
)

read_count = lru_cache(maxsize=65_536)(parse_count)  # answers are read for several tables, and many are alike


class Count(Task):
    """Rows with a `count` whose own answer states it, scored by the number that an answer states.

    An answer that states no number costs as much as answering 0, so that refusing hard items never pays.
    """

    name = "count"
    title = ("counting people", "사람 수 세기")
    measures = (
        Measure("penalised_mae", ("mean absolute error", "평균 절대 오차"), True, False, ("people", "명")),
        Measure("exact", ("exactly right", "정확히 맞음")),
    )
    headline = ("count_mae", "off by (people)")

    def turn(self, row: Question) -> int:
        """Place of the first answer that states exactly the row's `count`. Raises Unscorable."""
        if row.get("count") is None:
            raise Unscorable("no count")
        turn = find_count_turn(row["messages"], row["count"])
        if not turn:
            raise Unscorable(f"no answer states the row's count, {row['count']}")
        return turn

    def score(self, question: Question, answer: str) -> dict[str, float]:
        count = read_count(answer)
        return {
            "penalised_mae": float(abs((count or 0) - question["count"])),
            "exact": float(count == question["count"]),
        }

    def trivial_answers(self, train: Questions) -> dict[str, Trivial]:
        counts = image_counts(train)
        if not counts:
            return {}
        return {
            key: always(str(guess), (key.replace("_", " "), KOREAN_GUESSES[key]))
            for key, guess in trivial_guesses(counts).items()
        }

    def truth(self, question: Question) -> str:
        return str(question["count"])

    def caption(self, question: Question, answer: str) -> str:
        count = read_count(answer)
        return f"{question['count']} -> {'?' if count is None else count}"

    def remark(self, question: Question, answer: str, say: Say) -> str:
        count, truth = read_count(answer), question["count"]
        if count is None:
            return say("states no count", "사람 수가 없음")
        off = abs(count - truth)
        return say(
            f"read as {count}, {f'off by {off}' if off else 'right'}",
            f"{count}명으로 읽음, {f'{off}명 틀림' if off else '맞음'}",
        )

    def metrics(self, questions: Questions, answers: Answers, scores: Scores, train: Questions) -> dict[str, float]:
        """`count_...`: the numbers of `score_counts`, and `count_mae_train_median`, `count_mae_train_mean`.

        Those two are what always answering the median or mean of the train counts would cost: below these lines a model
        has not learned to look.
        """
        truth = [question["count"] for question in questions]
        numbers = score_counts([read_count(answer) for answer in answers], truth)
        metrics = {f"count_{name}": value for name, value in numbers.items() if isinstance(value, (int, float))}
        counts = image_counts(train)
        for name, guess in trivial_guesses(counts).items() if counts else ():
            metrics[f"count_mae_{name}"] = score_counts([guess] * len(truth), truth)["mae"]
        return metrics

    def best_trivial(self, metrics: Mapping[str, float]) -> float | None:
        """The least MAE of the constant guesses, in people."""
        return min(
            (metrics[f"count_mae_{name}"] for name in KOREAN_GUESSES if f"count_mae_{name}" in metrics), default=None
        )

    def sentence(self, metrics: Mapping[str, float]) -> str:
        error, baseline = metrics["count_penalised_mae"], metrics.get("count_mae_train_median")
        text = f"off by {error:.2f} people on {metrics['count_n']:.0f} held-out questions"
        if baseline is None:
            return text
        comparison = "better than" if error < baseline else "no better than"
        return f"{text}: {comparison} always answering the training median ({baseline:.2f})"

    def table(self, questions: Questions, answers: Answers, scores: Scores) -> dict[str, list[Any]]:
        return {
            "truth": [question["count"] for question in questions],
            "answer": list(answers),
            "answer_count": [read_count(answer) for answer in answers],
        }

    def findings(
        self, asked: Asked, answers: Mapping[str, Sequence[str]], labels: Mapping[str, str], say: Say
    ) -> Findings:
        true = [question["count"] for question in asked.questions]
        counts = {model: [read_count(answer) for answer in answers[model]] for model in MODELS}
        train_counts = image_counts(asked.train)
        guesses = trivial_guesses(train_counts) if train_counts else {}
        predicted = counts | {guess: [value] * len(true) for guess, value in guesses.items()}
        scores = {model: score_counts(values, true) for model, values in predicted.items()}
        sizes = crowd_sizes(true)
        by_size = {model: score_by_crowd_size(values, true, sizes) for model, values in predicted.items()}
        trivial = {key: say(*words) for key, (_, words) in self.trivial_answers(asked.train).items()}
        names = dict(labels) | trivial
        errors = {
            model: [abs((guess or 0) - truth) for guess, truth in zip(values, true, strict=True)]
            for model, values in predicted.items()
        }
        lines = [
            {key: question[key] for key in ("row", "image_id", "question", "reference")}
            | {"truth": true[place]}
            | {model: answers[model][place] for model in MODELS}
            | {f"{model}_count": counts[model][place] for model in MODELS}
            for place, question in enumerate(asked.questions)
        ]
        crowd, plots = self._plots(true, counts, by_size, sizes, labels, say)
        return Findings(
            title=say(*self.title),
            asked=describe_questions(asked, say),
            verdicts=self._verdicts(asked, errors, scores, trivial, say),
            metrics={
                "task": self.name,
                "not_counting_questions": asked.num_others,
                "scores": scores,
                "by_crowd_size": by_size,
            },
            numbers={
                f"{model}_{key}": scores[model][key]
                for model in MODELS
                for key in ("penalised_mae", "exact", "within_1")
            },
            lines=lines,
            tables=[score_table(scores, names, say), crowd_table(by_size, names, say)],
            plots=plots,
            pictures={
                "predicted_vs_true.png": predicted_against_true(true, counts).light,
                "error_by_crowd_size.png": crowd.light,
            },
            item_groups=self.items(
                asked, answers, {model: self.scores(asked.questions, answers[model]) for model in MODELS}, say
            ),
            all_items=self.all_items(asked, answers, say),
        )

    def _verdicts(self, asked: Asked, errors, scores, trivial: dict[str, str], say: Say) -> list:
        all_parsed = not any(scores[model]["unparsable_rate"] for model in MODELS)
        measure, exactly = (say(*measure.name) for measure in self.measures)
        if not all_parsed:
            measure += say(" (unparsable answers taken as 0)", " (읽을 수 없는 답은 0으로 봄)")
        exact = {model: [100.0 * (error == 0) for error in of_model] for model, of_model in errors.items()}
        settings = {"trivial": trivial, **asked.bootstrap}
        return [
            judge(measure, errors, asked.groups, lower_is_better=True, unit=say("people", "명"), **settings),
            judge(exactly, exact, asked.groups, lower_is_better=False, unit="%", **settings),
        ]

    def _plots(self, true, counts, by_size, sizes, labels, say: Say):
        """(picture of the error by crowd size, all plots)"""
        dots = say(
            "Each dot is a question, larger where several coincide; on the line the answer is right.",
            "점 하나가 질문 하나이고 겹치면 커집니다. 선 위의 답이 맞은 답입니다.",
        )
        plots = [
            Plot(
                say(f"Predicted against true, {labels[model]}", f"예측과 정답, {labels[model]}"),
                predicted_against_true(true, {model: counts[model]}),
                dots,
            )
            for model in MODELS
        ]
        bars = {
            "reference" if model == "train_median" else model: [part["penalised_mae"] for part in parts]
            for model, parts in by_size.items()
            if model != "train_mean"
        }
        crowd = error_by_crowd_size(sizes, bars, "mean absolute error")
        caption = say("Unparsable answers are taken as 0.", "읽을 수 없는 답은 0으로 봅니다.")
        plots.append(Plot(say("Error by crowd size", "인원 구간별 오차"), crowd, caption))
        return crowd, plots


KOREAN_GUESSES = {"train_median": "학습 데이터의 중앙값", "train_mean": "학습 데이터의 평균"}


def score_table(scores: dict[str, dict], labels: Mapping[str, str], say: Say) -> Table:
    """MAE, bias, share exact and share without a number, for each model."""

    def number(value: float | None, sign: str = "") -> str:
        return say("none", "없음") if value is None else f"{value:{sign}.2f}"

    return Table(
        say("Counting scores", "사람 수 점수"),
        [
            "",
            "MAE",
            say("MAE, penalised", "MAE, 벌점 포함"),
            "RMSE",
            say("bias", "치우침"),
            say("exact", "정확"),
            say("within 1", "1명 이내"),
            say("within 2", "2명 이내"),
            say("unparsable", "읽을 수 없음"),
        ],
        [
            [
                labels[model],
                number(part["mae"]),
                number(part["penalised_mae"]),
                number(part["rmse"]),
                number(part["bias"], "+"),
                *(f"{part[key]:.1%}" for key in ("exact", "within_1", "within_2", "unparsable_rate")),
            ]
            for model, part in scores.items()
        ],
        say(
            "In people. MAE, RMSE and bias (answer minus truth) are over the answers that state a count; in the penalised "
            "MAE an answer that states none costs as much as answering 0, and in the shares it is wrong.",
            "단위는 명입니다. MAE, RMSE, 치우침(답에서 정답을 뺀 값)은 사람 수를 말한 답만으로 냅니다. 벌점 포함 MAE에서는 수를 "
            "말하지 않은 답을 0이라고 답한 것으로 치고, 비율에서는 틀린 답입니다.",
        ),
    )


def crowd_table(by_size: dict[str, list[dict]], labels: Mapping[str, str], say: Say) -> Table:
    """Penalised MAE by the true number of people, for each model."""
    parts = next(iter(by_size.values()))
    return Table(
        say("Penalised MAE by crowd size", "인원 구간별 벌점 포함 MAE"),
        [say("people, true", "정답 인원"), say("questions", "질문 수"), *(labels[model] for model in by_size)],
        [
            [
                f"{part['from']} {say('to', '~')} {part['to']}" if part["from"] < part["to"] else str(part["from"]),
                str(part["n"]),
                *(f"{by_size[model][index]['penalised_mae']:.2f}" for model in by_size),
            ]
            for index, part in enumerate(parts)
        ],
    )


def image_counts(rows: Sequence[Question]) -> list[int]:
    """The `count` of each picture once, however many rows ask about it; empty when the rows have none."""
    counts = {row["image_id"]: row["count"] for row in rows if row.get("count") is not None and "image_id" in row}
    return list(counts.values())
