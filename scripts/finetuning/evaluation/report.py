"""One self-contained page about a run: the verdict, tables, pictures, and answers to look at. Knows nothing of the task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from finetuning.evaluation.plots import Picture
from finetuning.evaluation.verdict import BEATEN, MATCHED
from finetuning.pages import Table, render_page, speak
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


# Outcome of a verdict -> its colour on the page.
VERDICT_CLASSES = {
    "better": "better",
    "worse": "worse",
    BEATEN: "trivial",
    MATCHED: "trivial",
    "no measurable change": "unchanged",
    "too few to tell": "unchanged",
}
LONGEST = 160  # letters of a text in the list of all items


def shortened(item: Item) -> Item:
    """The item without its picture and remarks, its texts cut to LONGEST letters."""

    def cut(text: str) -> str:
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    return Item(item.name, cut(item.question), cut(item.truth), cut(item.base), cut(item.tuned))


def write_report(
    path: Path,
    *,
    title: str,
    outcome: str,
    sentences: Sequence[tuple[str, str]],
    facts: dict[str, str],
    tables: Sequence[Table] = (),
    figures: Sequence[Plot] = (),
    item_groups: dict[str, Sequence[Item]] | None = None,
    all_items: dict[str, Sequence[Item]] | None = None,
    language: str = "en",
    labels: dict[str, str] | None = None,
    warning: str = "",
) -> None:
    """Write the page to `path`: plain HTML that opens from disk, needs no network and runs no script.

    `outcome` is that of the verdict (it colours the page), `sentences` the verdict in words, most important first:
    what stands out of each, and the rest.
    `labels` name the two models. `all_items` are listed without pictures, folded away, long texts cut. All text is
    escaped; an item's images become thumbnails of at most 480 pixels. A page already at `path` is replaced only once the
    new one is whole.
    """
    page = render_page(
        "report.html.jinja",
        title=title,
        verdict_class=VERDICT_CLASSES[outcome],
        warning=warning,
        sentences=sentences,
        facts=facts,
        tables=tables,
        figures=figures,
        item_groups=item_groups or {},
        all_items={heading: [shortened(item) for item in items] for heading, items in (all_items or {}).items()},
        labels=labels or {"base": speak(language)("Base", "원본 모델"), "tuned": speak(language)("Tuned", "미세 조정")},
        language=language,
    )
    write_atomically(path, page)
