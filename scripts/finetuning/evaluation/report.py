"""One self-contained page about a run: the verdict, tables, pictures, and answers to look at. Knows nothing of the task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from finetuning.evaluation.plots import Picture
from finetuning.pages import Table, render_page
from finetuning.run_folder import write_atomically


@dataclass(frozen=True)
class Plot:
    title: str
    picture: Picture
    caption: str = ""


@dataclass(frozen=True)
class Item:
    """One question with its true answer and what both models said; a remark says how an answer was understood."""

    name: str
    question: str
    truth: str
    base: str
    tuned: str
    base_remark: str = ""
    tuned_remark: str = ""
    image: Image.Image | None = field(default=None, repr=False)


def write_report(
    path: Path,
    *,
    title: str,
    outcome: str,
    sentences: Sequence[str],
    facts: dict[str, str],
    tables: Sequence[Table] = (),
    figures: Sequence[Plot] = (),
    item_groups: dict[str, Sequence[Item]] | None = None,
    language: str = "en",
) -> None:
    """Write the page to `path`: plain HTML that opens from disk, needs no network and runs no script.

    `outcome` is that of the verdict (it colours the page), `sentences` the verdict in words, most important first.
    All text is escaped; an item's images become thumbnails of at most 480 pixels. A page already at `path` is replaced
    only once the new one is whole.
    """
    page = render_page(
        "report.html.jinja",
        title=title,
        outcome=outcome,
        sentences=sentences,
        facts=facts,
        tables=tables,
        figures=figures,
        item_groups=item_groups or {},
        language=language,
    )
    write_atomically(path, page)
