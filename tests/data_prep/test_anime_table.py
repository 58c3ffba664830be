"""Tables of other years and makers: which column says what, and what never becomes text."""

import csv
from pathlib import Path

import datasets
import prepare_anime
import pytest
from conftest import run_here

from finetuning.data.dataset import load_wording
from finetuning.tasks.anime_facts import FactReader
from preparing.anime_table import open_table, read_titles
from preparing.ledger import Ledger

# The same title in the columns of tables that people have.
FORMS = {
    "2016": {
        "anime_id": "1",
        "name": "Kaubooi &amp; Biba&#039;p",
        "genre": "Action, Sci-Fi",
        "type": "TV",
        "episodes": "26",
        "rating": "8.82",
        "members": "486824",
    },
    "2018": {
        "anime_id": "1",
        "title": "Kaubooi & Biba'p",
        "title_english": "",
        "title_japanese": "カウボーイ",
        "title_synonyms": "",
        "image_url": "https://x/1.jpg",
        "type": "TV",
        "source": "Original",
        "episodes": "26",
        "aired": "{'from': '1998-04-03', 'to': '1999-04-24'}",
        "duration": "24 min. per ep.",
        "rating": "R - 17+ (violence & profanity)",
        "score": "8.82",
        "scored_by": "914193",
        "rank": "26.0",
        "members": "486824",
        "producer": "Bandai Visual",
        "licensor": "Funimation",
        "studio": "Sunrise",
        "genre": "Action, Sci-Fi",
    },
    "2020 lists": {
        "uid": "1",
        "title": "Kaubooi & Biba'p",
        "synopsis": "Spike chases it.\r\n \r\n[Written by MAL Rewrite]",
        "genre": "['Action', 'Sci-Fi']",
        "aired": "Apr 3, 1998",
        "episodes": "26.0",
        "members": "930311",
        "popularity": "39",
        "ranked": "26.0",
        "score": "8.82",
        "img_url": "https://x/1.jpg",
    },
    "2020 MAL_ID": {
        "MAL_ID": "1",
        "Name": "Kaubooi & Biba'p",
        "Score": "8.82",
        "Genres": "Action, Sci-Fi",
        "English name": "Unknown",
        "Japanese name": "カウボーイ",
        "Type": "TV",
        "Episodes": "26",
        "Producers": "Bandai Visual",
        "Studios": "Sunrise",
        "Rating": "R - 17+ (violence & profanity)",
        "Score-10": "229170.0",
        "sypnopsis": "Spike chases it.",
    },
    "2023 API": {
        "anime_id": "1",
        "title": "Kaubooi & Biba'p",
        "score": "8.82",
        "scored_by": "914193",
        "episodes": "26",
        "genres": "['Action', 'Sci-Fi']",
        "themes": "['Space']",
        "studios": "['Sunrise']",
        "producers": "['Bandai Visual']",
        "synopsis": "Spike chases it.",
        "title_english": "",
        "title_japanese": "カウボーイ",
    },
    "English only": {
        "Rank": "1",
        "Score": "8.82",
        "Description": "Spike chases it.",
        "Japanese": "カウボーイ",
        "English": "Kaubooi & Biba'p",
        "Episodes": "26",
        "Genres": '[{"mal_id": 1, "name": "Action"}, {"mal_id": 24, "name": "Sci-Fi"}]',
        "Studios": '{"nodes": [{"name": "Sunrise"}]}',
    },
    "bars": {"title": "Kaubooi & Biba'p", "genres": "Action|Sci-Fi", "eps": "26 eps", "userRating": "8.82/10"},
}


def write(path: Path, *rows: dict[str, str], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path, columns: str | None = None):
    ledger = Ledger()
    table = open_table(path, columns)
    return read_titles(table, ledger), table, ledger


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_of_other_tables_are_found(tmp_path, form, separator):
    titles, table, ledger = read(write(tmp_path / "t.csv", FORMS[form], separator=separator))
    assert ledger.rejects == []
    [title] = titles
    assert (title.title, title.genres, title.episodes, title.score) == (
        "Kaubooi & Biba'p",
        ["Action", "Sci-Fi"],
        26,
        8.82,
    )
    assert title.studios == (["Sunrise"] if "studio" in str(table.columns).lower() else [])
    assert title.rating == (FORMS[form].get("Rating") or FORMS[form]["rating"] if "rating" in table.columns else "")
    assert title.synopsis == ("Spike chases it." if "synopsis" in table.columns else "")


def test_what_was_found_is_told(tmp_path):
    _, table, _ = read(write(tmp_path / "t.csv", FORMS["2016"]))
    assert table.describe() == [
        "columns: anime_id = anime_id, title = name, genres = genre, episodes = episodes, score = rating",
        "not used: type, members",
        "the column 'rating' holds numbers: it is the score, not the age rating",
    ]


def test_columns_can_be_said(tmp_path):
    path = write(tmp_path / "t.csv", {"Serie": "A", "Note": "7.5", "genre": "Drama", "score": "3"})
    titles, table, _ = read(path, "title=Serie, score=Note, genres=")
    assert (titles[0].title, titles[0].score, titles[0].genres) == ("A", 7.5, [])
    assert table.columns == {"title": "Serie", "score": "Note"}
    with pytest.raises(ValueError) as caught:
        open_table(path, "title=Series,colour=Note,score=Note,score=Note")
    assert [line.partition(":")[2].strip()[:20] for line in str(caught.value).splitlines()] == [
        "title=Series: the ta",
        "'colour=Note': expec",
        "score is given twice",
    ]


def test_a_table_without_a_title_or_a_fact_says_what_is_missing(tmp_path):
    for row in ({"genre": "Drama", "episodes": "3"}, {"title": "A", "colour": "red"}):
        with pytest.raises(ValueError, match=r"(?s)needed are a title and at least one of .* --columns title=Name"):
            open_table(write(tmp_path / "t.csv", row))


@pytest.mark.parametrize(
    "unknown",
    [
        "",
        "NA",
        "N/A",
        "#N/A",
        "<NA>",
        "nan",
        "NaN",
        "NULL",
        "null",
        "None",
        "-",
        "--",
        r"\N",
        "?",
        "TBA",
        "Unknown",
        "UNKNOWN",
        "None found",
        "None found, add some",
        "add some",
        "Not available",
        "[]",
        "['None found', 'add some']",
        "[nan]",
        "없음",
        "—",
        "(unknown)",
        "<none>",
        "N.A.",
        "unk",
        "Not Applicable",
        "Unknown, Unknown",
        "Ｎ／Ａ",
        "해당 없음",
        "[None found, add some]",
    ],
)
def test_marks_of_unknown_never_become_text(tmp_path, unknown):
    row = dict.fromkeys(
        ("Genres", "Producers", "Studios", "Rating", "Score", "Scored By", "English name", "Synopsis"), unknown
    )
    lists = unknown.startswith("[")
    row |= {"Rating": "", "Score": "", "Scored By": "", "English name": "", "Synopsis": ""} if lists else {}
    titles, _, ledger = read(write(tmp_path / "t.csv", {"anime_id": "1", "Name": "A", "Episodes": "3"} | row))
    assert ledger.rejects == []
    assert titles[0][2:] == ("A", "A", "A", "", "", [], [], [], 3, "", None, None)


@pytest.mark.parametrize(
    "cell",
    [
        "Slice of Life, Action",
        '["Slice of Life", "Action"]',
        "['Slice of Life', 'Action']",
        "('Slice of Life', 'Action')",
        "{'Slice of Life', 'Action'}",
        "['Slice of Life' 'Action']",
        "array(['Slice of Life', 'Action'], dtype=object)",
        '{"Slice of Life",Action}',
        "[Slice of Life, Action]",
        '[{"genre": "Slice of Life"}, {"genre": "Action"}]',
        "[&quot;Slice of Life&quot;, &quot;Action&quot;]",
    ],
)
def test_lists_of_other_programs_are_names_in_their_order(tmp_path, cell):
    titles, _, _ = read(write(tmp_path / "t.csv", {"title": "A", "genres": cell}))
    assert titles[0].genres == ["Slice of Life", "Action"]


@pytest.mark.parametrize(
    "name", ["Unknown", "None", "?", "-", "[C] The Money", "NANA", "<harmony/>", '["Oshi no Ko', "Another"]
)
def test_such_words_may_be_titles(tmp_path, name):
    titles, _, _ = read(write(tmp_path / "t.csv", {"title": name, "episodes": "3"}))
    assert titles[0].title == name


@pytest.mark.parametrize("name", ["", "nan", r"\N", "null"])
def test_a_row_without_a_name_is_called_by_another_or_rejected(tmp_path, name):
    rows = [
        {"title": name, "title_japanese": "カウボーイ", "episodes": "3"},
        {"title": name, "title_japanese": name, "episodes": "4"},
    ]
    titles, _, ledger = read(write(tmp_path / "t.csv", *rows))
    assert [title.title for title in titles] == ["カウボーイ"]
    assert [(reject.line, reject.detail) for reject in ledger.rejects] == [(3, "it has no title")]


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("A hero &amp; a friend.<br><i>It&#039;s</i> a tale.", "A hero & a friend. It's a tale."),
        ("&lt;p&gt;One.&lt;/p&gt;<br /><BR/>Two &amp;amp; three.", "One. Two & three."),
        ("A<b>bold</b> , quiet [i]tale[/i].~!He dies!~", "A bold, quiet tale. He dies"),
        ("Zero\u200bwidth\ufeff and\u00a0soft\u00adhyphen.", "Zerowidth and softhyphen."),
        ("Re\u0301sume\u0301 \x90and\tmore.", "Résumé and more."),
        ("Family \U0001f468\u200d\U0001f469 here.", "Family \U0001f468\u200d\U0001f469 here."),
        ("3 < 4 and 5 > 4.", "3 < 4 and 5 > 4."),
        ("A tale. (Source: ANN)", "A tale."),
        ("No synopsis has been added for this series yet. Click here to update this information.", ""),
        ("No synopsis information has been added to this title.", ""),
        ("Synopsis not available.", ""),
        ("There is no description yet.", ""),
        ("<table><tr><td>One.</td></tr></table><cite>Two.</cite> [list][*]Three.[/list]", "One. Two. Three."),
        ("<script>alert(1)</script>A tale.", "A tale."),
        ("No storyteller is safe.", "No storyteller is safe."),
    ],
)
def test_synopses_are_plain_text(tmp_path, given, cleaned):
    titles, _, _ = read(write(tmp_path / "t.csv", {"title": "A", "episodes": "1", "synopsis": given}))
    assert titles[0].synopsis == cleaned


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("genres", "['Action', 'Com", "opens a list that does not close"),
        ("genres", "[1, 2]", "1 is no name"),
        ("genres", "[{'id': 1}]", "has no name"),
        ("episodes", "12.5", "is not a whole number"),
        ("episodes", "many", "'many' is not a number"),
        ("score", "11", "is not between 0 and 10"),
        ("score", "inf", "is not a number"),
    ],
)
def test_values_that_cannot_be_are_rejected(tmp_path, column, value, told):
    rows = [{"title": "A", "episodes": "3", "genres": "", "score": "7"} for _ in range(12)]
    rows = [row | {"title": f"A{place}"} for place, row in enumerate(rows)]
    rows[0][column] = value
    titles, _, ledger = read(write(tmp_path / "t.csv", *rows))
    assert len(titles) == 11
    assert [(reject.line, reject.reason) for reject in ledger.rejects] == [(2, "bad_value")]
    assert told in ledger.rejects[0].detail


@pytest.mark.parametrize(("highest", "told"), [(100, "goes up to 100"), (5, "goes up to 5")])
def test_a_score_that_is_not_out_of_ten_is_left_out(tmp_path, highest, told):
    rows = [
        {"title": f"A{place}", "episodes": "3", "averageScore": str(highest * place / 25)} for place in range(1, 26)
    ]
    titles, table, _ = read(write(tmp_path / "t.csv", *rows))
    assert {title.score for title in titles} == {None}
    assert told in table.notes[0]
    titles, _, ledger = read(tmp_path / "t.csv", "score=averageScore")
    assert len(titles) + len(ledger.rejects) == 25
    assert all(title.score <= 10 for title in titles)


def test_rows_of_one_title_that_differ_in_lists_are_one(tmp_path):
    row = {"animeID": "1", "name": "A", "studio": "X", "episodes": "3"}
    rows = [row | {"genre": "Drama"}, row | {"genre": "Action"}, row | {"genre": "Drama", "studio": "Y"}]
    titles, _, ledger = read(write(tmp_path / "t.csv", *rows, row | {"genre": "Comedy", "episodes": "9"}))
    assert [(title.genres, title.studios) for title in titles] == [(["Drama", "Action"], ["X", "Y"])]
    assert [reject.reason for reject in ledger.rejects] == ["row_of_same_title", "row_of_same_title", "duplicate_id"]


def test_companies_keep_their_legal_form(tmp_path):
    titles, _, _ = read(write(tmp_path / "t.csv", {"title": "A", "studios": "Foo Co., Ltd., Bar, Inc., J.C.Staff"}))
    assert titles[0].studios == ["Foo Co., Ltd.", "Bar, Inc.", "J.C.Staff"]


def test_an_excel_workbook_is_named(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04....")
    with pytest.raises(ValueError, match="an Excel workbook"):
        open_table(tmp_path / "t.xlsx")


@pytest.mark.parametrize("language", ["en", "ko"])
def test_names_that_end_in_a_stop_are_written_once_and_read_back(tmp_path, language):
    rows = [
        {
            "id": "1",
            "title": "A",
            "studios": "A.C.G.T.",
            "producers": "feel., m.o.e.",
            "episodes": "12",
            "score": "7.5",
        },
        {"id": "2", "title": "B", "studios": "feel., Zexcs", "producers": "", "episodes": "", "score": "8"},
        {"id": "3", "title": "C", "studios": "m.o.e.", "producers": "Zexcs", "episodes": "", "score": "9"},
    ]
    words = ("--validation_share", "0", "--test_share", "0", "--language", language)
    done = run_here(
        "data_prep/prepare_anime.py", "--csv", write(tmp_path / "t.csv", *rows), "--output", tmp_path / "d", *words
    )
    assert done.returncode == 0, done.stderr
    data = datasets.load_from_disk(str(tmp_path / "d"))["train"]
    assert not any(".." in messages[1]["content"] for messages in data["messages"])
    reader = FactReader(load_wording(str(tmp_path / "d")), data)
    for question in reader.questions(data):
        said = reader.read(question["kind"], question["reference"])
        assert {field: said[field] for field in question["facts"]} == question["facts"]


def test_the_words_of_the_project_have_no_particle_behind_a_name():
    text = (prepare_anime.WORDINGS / "ko.yaml").read_text("utf-8").partition("about:")[2]
    assert "|" not in text
