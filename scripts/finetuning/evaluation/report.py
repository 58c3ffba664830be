"""One self-contained page about a run: the verdict, tables, pictures, and answers to look at. Knows nothing of the task."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from finetuning.evaluation.plots import Picture

TEMPLATE = "report.html.jinja"
THUMBNAIL_SIDE = 480  # pixels: sharp at the 320 px that a card is wide


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def as_markdown(self) -> str:
        """The same table as GitHub shows it, pipes and line breaks in cells made harmless."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        text = "\n".join(
            "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
        )
        return f"{text}\n\n{self.note}\n" if self.note else f"{text}\n"


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {"png_uri": _png_uri, "thumbnail_uri": _thumbnail_uri}
    page = environment.get_template(TEMPLATE).render(
        title=title,
        outcome=outcome,
        sentences=sentences,
        facts=facts,
        tables=tables,
        figures=figures,
        item_groups=item_groups or {},
        language=language,
    )
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.rename(path)


def _png_uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode()


def _thumbnail_uri(image: Image.Image) -> Markup:
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "JPEG", quality=85)
    return Markup("data:image/jpeg;base64,") + base64.b64encode(buffer.getvalue()).decode()
