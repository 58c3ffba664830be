"""The report is one page that needs nothing else and shows text as text."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from finetuning.evaluation.plots import DARK, LIGHT, error_by_crowd_size, loss_curves, predicted_against_true
from finetuning.evaluation.report import Item, Plot, Table, write_report

HOSTILE = """<script>alert("x")</script> & 'quoted' <img src=http://example.com/x.png>"""


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    picture = predicted_against_true([3, 8], {"tuned": [3, None]})
    photo = Image.new("RGB", (1600, 1200), (200, 30, 30))
    item = Item(HOSTILE, HOSTILE, "7", HOSTILE, "일곱 명입니다.", tuned_remark="read as 7, right", image=photo)
    write_report(
        path,
        title=f"run {HOSTILE}",
        outcome="no measurable change",
        sentences=[("No measurable change: so it is.", ""), (HOSTILE, "")],
        facts={"Base model": HOSTILE},
        tables=[Table("Scores", ["", "MAE"], [["base", "8.40"], [HOSTILE, "3.10"]], note=HOSTILE)],
        figures=[Plot("Dots", picture, HOSTILE)],
        item_groups={"Worst answers": [item, Item("text only", "Q?", "A", "B", "C")], "Best answers": []},
        language="ko",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_is_loaded_and_nothing_runs(page):
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    images = page.all("img")
    assert len(images) == 2  # one plot, one thumbnail: hostile text made no third
    sources = [image["src"] for image in images] + [source["srcset"] for source in page.all("source")]
    assert len(sources) == 3 and all(source.startswith("data:image/") for source in sources)
    assert all(image["alt"] for image in images)
    assert {"default-src 'none'; img-src data:; style-src 'unsafe-inline'"} <= {
        meta.get("content") for meta in page.all("meta")
    }


def test_hostile_text_is_shown_as_it_is(page):
    assert page.text.count(HOSTILE) == 10  # title twice, sentence, fact, cell, note, caption, three of the item
    assert "일곱 명입니다." in page.text and "(read as 7, right)" in page.text


def test_the_page_says_its_language_and_fits_a_phone(page):
    assert page.all("html") == [{"lang": "ko"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "Worst answers" in page.text and "Best answers" not in page.text  # an empty group has no heading
    assert {"class": "verdict unchanged"} in page.all("div")


def test_a_thumbnail_is_small(page):
    thumbnail = page.all("img")[1]["src"].partition("base64,")[2]
    assert Image.open(io.BytesIO(base64.b64decode(thumbnail))).size == (480, 360)


def test_a_table_in_markdown_keeps_its_columns():
    table = Table("t", ["", "MAE"], [["a | b\nc", "1.00"]], note="In people.")
    assert table.as_markdown() == "|  | MAE |\n| --- | ---: |\n| a \\| b c | 1.00 |\n\nIn people.\n"


@pytest.mark.slow
def test_plots_come_on_light_and_on_dark_paper():
    plots = [
        predicted_against_true([3, 8, 8], {"base": [None, None, None], "tuned": [3, 8, 500]}),
        error_by_crowd_size([(1, 4), (5, 5)], {"base": [3.0, None], "reference": [1.0, 2.0]}, "MAE"),
        loss_curves([{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "train_runtime": 3.0}]),
    ]
    for picture in plots:
        for png, paper in ((picture.light, LIGHT), (picture.dark, DARK)):
            corner = Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0))
            assert "#{:02x}{:02x}{:02x}".format(*corner) == paper["paper"]
    assert loss_curves([{"step": 1, "train_runtime": 3.0}]) is None
