"""HTML pages that open from disk, need no network and run no script; and tables in Markdown."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from finetuning.flags import LANGUAGES

TEMPLATES = Path(__file__).parent / "page_templates"
THUMBNAIL_SIDE = 480  # pixels: sharp at the 320 px that a card is wide
Say = Callable[[str, str], str]


def speak(language: str) -> Say:
    """`say(english, korean)`: the one of two wordings that is in `language`, `en` or `ko`."""
    place = LANGUAGES.index(language)
    return lambda english, korean: (english, korean)[place]


def model_names(say: Say) -> dict[str, str]:
    """What the two models of an evaluation are called in tables."""
    return {"base": say("base", "원본 모델"), "tuned": say("tuned", "미세 조정")}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numbers: bool = False) -> str:
    """The table as GitHub shows it; pipes and line breaks in cells are made harmless.

    With `numbers` every column but the first is aligned on the right.
    """
    marks = ["---", *["---:" if numbers else "---"] * (len(columns) - 1)]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in line) + " |"
        for line in (columns, marks, *rows)
    )


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def as_markdown(self) -> str:
        """The table as Markdown, its note below it."""
        text = markdown_table(self.columns, self.rows, numbers=True)
        return f"{text}\n\n{self.note}\n" if self.note else f"{text}\n"


class AnswerTable(NamedTuple):
    """Answers of an evaluation: columns of equal length (`image` holds pictures), and for each answer a caption and
    whether it is right."""

    columns: dict[str, list[Any]]
    captions: list[tuple[str, bool]]


def render_page(template: str, *, title: str, language: str = "en", **values: Any) -> str:
    """The page that `template` (a file of page_templates/) makes of `values`; all text is escaped.

    Filters of the templates: `png_uri` (PNG bytes), `jpeg_uri` and `thumbnail_uri` (PIL images; a thumbnail is at most
    480 pixels wide and high).
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"png_uri": _png_uri, "jpeg_uri": _jpeg_uri, "thumbnail_uri": _thumbnail_uri}
    return environment.get_template(template).render(title=title, language=language, say=speak(language), **values)


def _png_uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode()


def _jpeg_uri(image: Image.Image, quality: int = 90) -> Markup:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Markup("data:image/jpeg;base64,") + base64.b64encode(buffer.getvalue()).decode()


def _thumbnail_uri(image: Image.Image) -> Markup:
    thumbnail = image.convert("RGB")
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return _jpeg_uri(thumbnail, quality=85)
