"""What an evaluation leaves behind, whatever the task: verdict, tables, pictures, items, page, files, and W&B."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from finetuning.evaluation.plots import loss_curves
from finetuning.evaluation.report import Item, Plot, write_report
from finetuning.evaluation.verdict import Verdict, describe, details, headline
from finetuning.manifest import MANIFEST, write_manifest
from finetuning.model_card import write_run_card
from finetuning.pages import Say, Table, speak
from finetuning.run_folder import (
    EVALUATION,
    EvaluationFolder,
    read_arguments,
    read_log_history,
    read_metrics,
    write_atomically,
)

SHOWN = 6  # items in each group of the page
MOST_LISTED = 1_000  # items in the list of all, evenly spaced where there are more


@dataclass
class Findings:
    """What a task makes of the answers of both models.

    `metrics` goes into metrics.json, `numbers` to W&B, `pictures` (file name -> plot) beside the page, `lines` into
    answers.jsonl; `asked` says in words what was asked. The first verdict colours the page.
    """

    title: str
    asked: str
    verdicts: list[Verdict]
    metrics: dict[str, Any]
    numbers: dict[str, float | None]
    lines: list[dict[str, Any]]
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    item_groups: dict[str, Sequence[Item]] = field(default_factory=dict)
    all_items: dict[str, Sequence[Item]] = field(default_factory=dict)


def write_evaluation(
    run: Path,
    folder: EvaluationFolder,
    base: str,
    findings: Findings,
    settings: dict[str, Any],
    *,
    language: str,
    is_headline: bool,
    warning: str = "",
) -> None:
    """All files of an evaluation into `folder`, metrics.json and the manifest last; and its tables and pictures to W&B.

    With `is_headline` the page also becomes the run's own, `report.html`. A `warning` stands above the verdict.
    """
    (folder.folder / MANIFEST).unlink(missing_ok=True)  # of another language's page
    say = speak(language)
    sentences = [describe(verdict, say) for verdict in findings.verdicts]
    plots = list(findings.plots)
    pictures = dict(findings.pictures)
    loss = loss_curves(read_log_history(run))
    if loss is not None:
        caption = say("Per supervised token.", "학습하는 토큰 하나당 손실입니다.")
        plots.append(Plot(say("Loss while training", "학습 중 손실"), loss, caption))
        pictures["loss.png"] = loss.light
    for name, png in pictures.items():
        write_atomically(folder.folder / name, png)
    write_report(
        folder.page,
        title=f"{run.name}: {findings.title}",
        outcome=findings.verdicts[0].outcome,
        sentences=[(headline(verdict, say), details(verdict, say)) for verdict in findings.verdicts],
        warning=warning,
        facts={
            **weights_of(run, say),
            say("Base model", "원본 모델"): base,
            say("Questions", "질문"): findings.asked,
            say("Answers", "답"): say(
                f"greedy, at most {settings['max_new_tokens']} tokens, the same prompts for both models",
                f"greedy, 최대 {settings['max_new_tokens']}토큰, 두 모델에 같은 프롬프트",
            ),
        },
        tables=findings.tables,
        figures=plots,
        item_groups=findings.item_groups,
        all_items=findings.all_items,
        language=language,
    )
    if is_headline:
        write_atomically(folder.page_of_run, folder.page.read_bytes())
    metrics = {
        "settings": settings,
        "base_model": base,
        "language": language,
        **findings.metrics,
        "verdict": [verdict.as_dict() for verdict in findings.verdicts],
    }
    tables = [f"**{table.title}**\n\n{table.as_markdown()}" for table in findings.tables]
    folder.finish(metrics, findings.lines, "\n\n".join([*([warning] if warning else []), *sentences, *tables]))
    write_manifest(folder.folder)
    write_run_card(run)
    items = [item for group in findings.item_groups.values() for item in group]
    name = folder.folder.relative_to(run / EVALUATION).as_posix()
    log_to_wandb(run, name, findings.numbers, findings.tables, plots, items)


def weights_of(run: Path, say: Say) -> dict[str, str]:
    """Of a run that kept its best checkpoint: which step, and by what."""
    metrics = read_metrics(run)
    if "kept_step" not in metrics:
        return {}
    best = (read_arguments(run) or {}).get("metric_for_best_model", "loss")
    return {
        say("Weights", "가중치"): say(
            f"of step {metrics['kept_step']} of {metrics['global_step']}, the best by {best} while training",
            f"{metrics['global_step']}스텝 중 {metrics['kept_step']}스텝, 학습 중 {best} 기준으로 가장 좋았음",
        )
    }


def log_to_wandb(
    run: Path,
    name: str,
    numbers: dict[str, float | None],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    items: Sequence[Item],
) -> None:
    """The evaluation in the W&B run of the training: numbers, tables, plots, items with pictures. Nothing without W&B."""
    from finetuning import tracking  # the Trainer comes with it

    if "wandb" not in tracking.set_up(str(run), run.name):
        return
    import wandb

    logged: dict[str, Any] = {f"{name}/{key}": value for key, value in numbers.items()}
    for table in tables:
        logged[f"{name}/{table.title}"] = wandb.Table(
            columns=list(table.columns), data=[list(row) for row in table.rows]
        )
    for plot in plots:
        with_bytes = Image.open(io.BytesIO(plot.picture.light))
        logged[f"{name}/{plot.title}"] = wandb.Image(with_bytes, caption=plot.caption)
    columns = ["item", "image", "question", "truth", "base", "tuned"]
    rows = [
        [item.name, item.image and wandb.Image(item.image), item.question, item.truth, item.base, item.tuned]
        for item in items
    ]
    logged[f"{name}/answers"] = wandb.Table(columns=columns, data=rows)
    wandb.log(logged)
    wandb.finish()
