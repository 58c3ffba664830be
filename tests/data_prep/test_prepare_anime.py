"""From the table to the dataset: words, unknown values, rejects, splits."""

import csv
import json
import subprocess
from pathlib import Path

import datasets
import make_sample_anime
import prepare_anime
import pytest
import yaml
from conftest import SHARED, run_command, run_here

from preparing.anime_table import open_table, read_titles
from preparing.korean_particles import attach_particle
from preparing.ledger import Ledger
from preparing.templates import Value, find_wording_problems, join_names, load_wording

REAL_TABLE = SHARED / "anime" / "anime-dataset-2023.csv"
COWBOY_BEBOP = {
    "anime_id": "1",
    "Name": "Cowboy Bebop",
    "English name": "Cowboy Bebop",
    "Other name": "カウボーイビバップ",
    "Score": "8.75",
    "Genres": "Action, Award Winning, Sci-Fi",
    "Synopsis": "Crime is timeless.\n\nSpike chases it.\n\n(Source: ANN)",
    "Episodes": "26.0",
    "Producers": "Bandai Visual",
    "Studios": "Sunrise",
    "Rating": "R - 17+ (violence & profanity)",
    "Scored By": "914193.0",
}


def write_table(path: Path, *rows: dict[str, str], encoding: str = "utf-8") -> Path:
    columns = list(dict.fromkeys([*COWBOY_BEBOP, "Image URL"]))
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, columns, restval="UNKNOWN")
        writer.writeheader()
        writer.writerows(rows)
    return path


def prepare(table: Path, output: Path, *arguments: str, by=run_here) -> subprocess.CompletedProcess[str]:
    return by("data_prep/prepare_anime.py", "--csv", table, "--output", output, *arguments)


def answers(row: dict[str, str], language: str, tmp_path: Path) -> dict[str, str]:
    ledger = Ledger()
    table = write_table(tmp_path / "one.csv", row)
    titles = read_titles(open_table(table), ledger)
    wording = load_wording(prepare_anime.WORDINGS / f"{language}.yaml")
    return prepare_anime.write_answers(titles, wording, None, ledger, table)[int(row["anime_id"])]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anime")
    make_sample_anime.main(folder / "anime.csv", num_titles=60, seed=0)
    done = prepare(folder / "anime.csv", folder / "data", "--questions_per_fact", "all", "--test_share", "0.2")
    assert done.returncode == 0, done.stderr
    return folder


def test_english_answers(tmp_path):
    assert answers(COWBOY_BEBOP, "en", tmp_path) == {
        "about": '"Cowboy Bebop" is also known as カウボーイビバップ. It belongs to the Action, Award Winning and Sci-Fi '
        "genres. Crime is timeless. Spike chases it.",
        "made": "It was produced by Bandai Visual. It was animated by Sunrise. It has 26 episodes.",
        "received": "It is rated R - 17+ (violence & profanity). Its average score is 8.75 out of 10. "
        "It was scored by 914,193 people.",
    }


def test_korean_answers(tmp_path):
    assert answers(COWBOY_BEBOP, "ko", tmp_path) == {
        "about": "‘Cowboy Bebop’의 다른 이름은 カウボーイビバップ입니다. 장르는 액션, 수상작, SF입니다. "
        "Crime is timeless. Spike chases it.",
        "made": "제작사는 Bandai Visual입니다. 애니메이션 제작을 맡은 곳은 Sunrise입니다. 모두 26화입니다.",
        "received": "관람 등급은 17세 이상 관람가(R, 폭력과 욕설)입니다. 평균 점수는 10점 만점에 8.75점입니다. "
        "914,193명이 점수를 매겼습니다.",
    }


def test_one_of_a_thing_is_singular(tmp_path):
    row = COWBOY_BEBOP | {"Episodes": "1.0", "Genres": "Drama", "Scored By": "1.0"}
    said = answers(row, "en", tmp_path)
    assert "It belongs to the Drama genre." in said["about"]
    assert said["made"].endswith("It has 1 episode.")
    assert said["received"].endswith("It was scored by 1 person.")


def test_the_english_name_falls_back_to_the_name_and_other_names_are_told_once(tmp_path):
    unknown = answers(COWBOY_BEBOP | {"English name": "UNKNOWN"}, "en", tmp_path)
    assert unknown["about"].startswith('"Cowboy Bebop" is also known as カウボーイビバップ. ')
    translated = answers(COWBOY_BEBOP | {"Name": "Uchuu no Kauboi"}, "en", tmp_path)
    assert translated["about"].startswith('"Cowboy Bebop" is also known as Uchuu no Kauboi and カウボーイビバップ. ')


@pytest.mark.parametrize("unknown", ["UNKNOWN", "Unknown", "", "None found, add some", "nan"])
def test_unknown_values_never_become_text(tmp_path, unknown):
    row = COWBOY_BEBOP | {"Studios": unknown, "Rating": unknown, "Score": "UNKNOWN", "Other name": unknown}
    row["Synopsis"] = "No description available for this anime."
    assert answers(row, "en", tmp_path) == {
        "about": "It belongs to the Action, Award Winning and Sci-Fi genres.",
        "made": "It was produced by Bandai Visual. It has 26 episodes.",
        "received": "It was scored by 914,193 people.",
    }


def test_an_answer_with_nothing_left_to_say_goes_to_the_ledger(tmp_path):
    row = COWBOY_BEBOP | {"Producers": "UNKNOWN", "Studios": "UNKNOWN", "Episodes": "0.0"}
    ledger = Ledger()
    table = write_table(tmp_path / "one.csv", row)
    wording = load_wording(prepare_anime.WORDINGS / "en.yaml")
    said = prepare_anime.write_answers(read_titles(open_table(table), ledger), wording, None, ledger, table)
    assert list(said[1]) == ["about", "received"]
    assert [(reject.line, reject.reason) for reject in ledger.rejects] == [(2, "nothing_known")]
    assert ledger.counts()["answers"] == {"read": 3, "accepted": 2, "rejected": 1}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("치도리", "치도리는"),
        ("로빈", "로빈은"),
        ("Cowboy Bebop", "Cowboy Bebop은"),  # 비밥
        ("Naruto", "Naruto는"),
        ("Hellsing (TV)", "Hellsing (TV)은"),  # a bracketed tail is not read
        ("Trigun!", "Trigun!은"),
        ("Bones", "Bones는"),
        ("Eyeshield 21", "Eyeshield 21은"),  # 일
        ("Studio 4", "Studio 4는"),  # 사
        ("Ichigo 100%", "Ichigo 100%는"),  # 퍼센트
        ("MTV", "MTV는"),
        ("OLM", "OLM은"),  # 엠
        ("Pokémon", "Pokémon은"),
        ("さくら", "さくら는"),
        ("ルパン", "ルパン은"),
        ("Pierrot", "Pierrot는"),  # 피에로
        ("Xebec", "Xebec은"),
        ("Magic", "Magic은"),
        ("ufotable", "ufotable은"),  # 유포테이블
        ("Time", "Time은"),
        ("Dr. STONE", "Dr. STONE은"),
        ("Tsukihime", "Tsukihime는"),
        ("Anime", "Anime는"),
        ("Machine", "Machine은"),
        ("Hit", "Hit는"),  # 히트
        ("Cat", "Cat은"),  # 캣
        ("Project", "Project는"),
        ("Sweet", "Sweet는"),
        ("Blackout", "Blackout은"),  # 블랙아웃
        ("Group", "Group은"),
        ("Club", "Club은"),
        ("Blood", "Blood는"),
        ("Good", "Good은"),
        ("Prototype", "Prototype은"),
        ("Relationship", "Relationship은"),
        ("Shock", "Shock는"),
        ("Black", "Black은"),
        ("FLCL", "FLCL는"),  # 프리크리
        ("TV", "TV는"),
        ("UFO", "UFO는"),
        ("VAP", "VAP은(는)"),  # 브이에이피, 밥
        ("Part II", "Part II는"),
        ("Part III", "Part III은(는)"),  # 삼, 쓰리
        ("Mizgrot", "Mizgrot은(는)"),  # in no language that is known here
        ("黃金", "黃金은(는)"),
    ],
)
def test_korean_particles_agree_with_the_sound_before_them(word, expected):
    assert attach_particle(word, "은", "는") == expected


def test_particles_after_rieul_and_closing_marks():
    assert attach_particle("서울", "으로", "로") == "서울로"
    assert attach_particle("부산", "으로", "로") == "부산으로"
    assert attach_particle("서울", "을", "를") == "서울을"
    assert attach_particle("黃金", "’을", "’를") == "黃金’을(를)"


def test_lists_and_numbers_pick_their_form():
    assert f"{join_names(['A', 'B', 'C'], ' and '):genre|genres}" == "A, B and C genres"
    assert f"{join_names(['A'], ' and '):genre|genres}" == "A genre"
    assert f"{Value('1,200', number=1200):episode|episodes}" == "1,200 episodes"


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_wording_files_are_in_order_and_ask_several_ways(language):
    wording = load_wording(prepare_anime.WORDINGS / f"{language}.yaml")
    for kind in ("about", "made", "received"):
        assert len(wording[kind]["train_questions"]) >= 4
        assert len(wording[kind]["test_questions"]) >= 2


def test_every_mistake_in_a_wording_file_is_told_at_once(tmp_path):
    wording = load_wording(prepare_anime.WORDINGS / "en.yaml")
    wording["colour"] = "red"
    wording["made"]["answer"] = ["It was made by {studio}.", "{episodes:episodes}", "broken {"]
    wording["received"]["test_questions"] = ["How good is it?", wording["received"]["train_questions"][0]]
    del wording["about"]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(wording))
    with pytest.raises(ValueError) as caught:
        load_wording(tmp_path / "bad.yaml")
    told = str(caught.value)
    for mistake in (
        "unknown key 'colour'",
        "about: missing",
        "unknown field {studio}",
        "{episodes:episodes}: expected two forms",
        "'broken {'",
        "does not name the {title}: 'How good is it?'",
        "is in train_questions and in test_questions",
    ):
        assert mistake in told
    assert len(find_wording_problems(wording)) == 7


def test_rejects_are_told_with_line_and_reason_and_the_sums_agree(sample):
    manifest = json.loads((sample / "data" / "manifest.json").read_text("utf-8"))
    assert manifest["read"] == {
        "titles": {"read": 64, "accepted": 60, "rejected": 4},
        "answers": {"read": 180, "accepted": 179, "rejected": 1},
    }
    with (sample / "data" / "rejects.csv").open(encoding="utf-8-sig", newline="") as file:
        rejects = list(csv.DictReader(file))
    assert [reject["reason"] for reject in rejects] == [
        "duplicate_id",
        "ambiguous_name",
        "wrong_number_of_cells",
        "bad_value",
        "nothing_known",
    ]
    lines = (sample / "anime.csv").read_text("utf-8-sig").split("\n")
    assert "Nido no Id" in lines[int(rejects[0]["line"]) - 1]  # synopses with line breaks do not shift the numbers
    assert rejects[3]["detail"] == "Score 'great' is not a number"


def test_splits_hold_out_titles_and_words(sample):
    dataset = datasets.load_from_disk(str(sample / "data"))
    ids = {name: set(rows["anime_id"]) for name, rows in dataset.items()}
    questions = {name: {messages[0]["content"] for messages in rows["messages"]} for name, rows in dataset.items()}
    assert len(ids["validation"]) == 3
    assert not ids["validation"] & ids["train"]
    assert len(ids["test"]) == 11
    assert ids["test"] <= ids["train"]
    assert not questions["test"] & questions["train"]
    # All four ways of asking for each of the answers of 57 titles, one of which nobody knows.
    taught = dataset["train"].num_rows / 4
    assert taught + dataset["validation"].num_rows == 179
    manifest = json.loads((sample / "data" / "manifest.json").read_text("utf-8"))
    assert set(manifest["leak_report"].values()) == {0}
    assert manifest["rows"] == {name: rows.num_rows for name, rows in dataset.items()}


def test_ground_truth_travels_along(tmp_path):
    table = write_table(tmp_path / "one.csv", COWBOY_BEBOP)
    assert prepare(table, tmp_path / "data", "--language", "ko").returncode == 0
    row = datasets.load_from_disk(str(tmp_path / "data"))["train"][1]
    assert row.pop("messages")[1]["content"].endswith("모두 26화입니다.")
    assert row == {
        "anime_id": 1,
        "title": "Cowboy Bebop",
        "kind": "made",
        "genres": ["액션", "수상작", "SF"],
        "producers": ["Bandai Visual"],
        "studios": ["Sunrise"],
        "episodes": 26,
        "rating": "17세 이상 관람가(R, 폭력과 욕설)",
        "score": 8.75,
        "scored_by": 914193,
    }


def test_series_stay_together_and_shared_english_names_are_not_asked_for(tmp_path):
    names = [
        ("Cowboy Bebop", "Cowboy Bebop"),
        ("Cowboy Bebop: Tengoku no Tobira", "Cowboy Bebop: The Movie"),
        ("Trigun", "Trigun"),
        ("Ichigo 100%", "Strawberry 100%"),
        ("Ichigo 100% OVA", "Strawberry 100%"),
    ]
    rows = [
        {"anime_id": str(number), "Name": name, "English name": english, "Episodes": "3.0"}
        for number, (name, english) in enumerate(names, start=1)
    ]
    titles = read_titles(open_table(write_table(tmp_path / "t.csv", *rows)), Ledger())
    series = prepare_anime.group_series(titles)
    assert series[0] == series[1]
    assert series[3] == series[4]
    assert len(set(series)) == 3
    assert [title.title for title in titles[2:]] == ["Trigun", "Ichigo 100%", "Ichigo 100% OVA"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_encodings(tmp_path, encoding):
    row = COWBOY_BEBOP | {"Other name": "카우보이 비밥"}
    table = write_table(tmp_path / "t.csv", row, encoding=encoding)
    assert read_titles(open_table(table), Ledger())[0].other_name == "카우보이 비밥"


@pytest.mark.slow
def test_user_mistakes_are_told_in_words(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("anime_id,Name,Nme\n1,a,b\n")
    missing = prepare(table, tmp_path / "data", by=run_command)
    assert missing.returncode == 1
    assert "missing columns: needed are a title and at least one of genres, synopsis" in missing.stderr
    assert "found: anime_id, Name, Nme" in missing.stderr
    assert "Traceback" not in missing.stderr
    write_table(table, COWBOY_BEBOP | {"Score": "great"})
    nothing = prepare(table, tmp_path / "data")
    assert nothing.returncode == 1
    assert "no row was accepted" in nothing.stderr
    assert "Score 'great' is not a number" in nothing.stderr
    (tmp_path / "data").mkdir()
    assert "already exists" in prepare(table, tmp_path / "data").stderr
    assert "cannot be read" in prepare(tmp_path / "no.csv", tmp_path / "new").stderr


def test_the_sample_is_the_same_every_time(tmp_path):
    for name in ("a.csv", "b.csv"):
        make_sample_anime.main(tmp_path / name, num_titles=20, seed=3)
    text = (tmp_path / "a.csv").read_bytes()
    assert text == (tmp_path / "b.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbfanime_id,Name,English name,")
    assert len(make_sample_anime.COLUMNS) == 24


@pytest.mark.skipif(not REAL_TABLE.is_file(), reason=f"the real table is not at {REAL_TABLE}")
@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_real_table(tmp_path, language):
    done = prepare(REAL_TABLE, tmp_path / "data", "--language", language)
    assert done.returncode == 0, done.stderr
    dataset = datasets.load_from_disk(str(tmp_path / "data"))
    assert {name: rows.num_rows for name, rows in dataset.items()} == {"train": 3420, "validation": 180, "test": 171}
    said = [messages[1]["content"] for rows in dataset.values() for messages in rows["messages"]]
    assert not any("UNKNOWN" in text or ".0 " in text or "(Source" in text for text in said)
    assert set(json.loads((tmp_path / "data" / "manifest.json").read_text("utf-8"))["leak_report"].values()) == {0}
