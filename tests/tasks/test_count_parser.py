"""Counts are read as people write them, and never guessed."""

import json
import unicodedata
from pathlib import Path

import pytest

from finetuning.tasks.count_parser import parse_count

CORPUS = Path(__file__).parent / "count_answers.jsonl"  # answers, each with what may be read from it


def test_of_the_corpus_no_answer_is_read_wrongly_and_hardly_any_refused():
    answers = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    assert len(answers) > 1000
    wrong, refused = [], []
    for row in answers:
        for form in ("NFC", "NFD"):
            count = parse_count(unicodedata.normalize(form, row["answer"]))
            if count not in row["accept"]:
                (refused if count is None else wrong).append((row["answer"], count))
    assert not wrong
    assert not refused


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("7", 7),
        ("7.", 7),
        ("Answer: 7", 7),
        ("There are 7.", 7),
        ("I can see 7 in the frame.", 7),
        ("about 7", 7),
        ("7 people or so", 7),
        ("Seven (7) people", 7),
        ("1,024", 1024),
        ("１２명", 12),
        ("seven people", 7),
        ("There are twenty-three people", 23),
        ("Twenty three people are walking.", 23),
        ("One hundred and five people.", 105),
        ("a hundred people", 100),
        ("two thousand three hundred and one people", 2301),
        ("There are 7 visible people in frame 12.", 7),
        ("Frame 12 shows 7 people.", 7),
        ("In the image 7 people are walking.", 7),
        ("2024-05-03 10:30:11 7 people", 7),
        ("The number of people in the hallway is 9.", 9),
        ("People: 14", 14),
        ("There are 10 people in total: 7 men and 3 women.", 10),
        ("A total of 10 people, 7 men and 3 women", 10),
        ("There are 7 people, 3 of whom are sitting.", 7),
        ("There are no cars. 7 people are here.", 7),
        ("There is one person.", 1),
        ("no one", 0),
        ("Nobody.", 0),
        ("There is nobody in the mall.", 0),
        ("There are no people in this image.", 0),
        ("I don't see any people.", 0),
        ("zero", 0),
        ("0명", 0),
        ("None.", 0),
        ("일곱 명", 7),
        ("7명", 7),
        ("7 명입니다.", 7),
        ("일곱", 7),
        ("일곱입니다.", 7),
        ("스물셋이요", 23),
        ("스물세 명", 23),
        ("스무 명이 있습니다", 20),
        ("열두명이 보입니다", 12),
        ("한 명", 1),
        ("두 사람이 걷고 있습니다.", 2),
        ("네 명입니다", 4),
        ("네, 일곱 명입니다.", 7),
        ("세 분이 계십니다", 3),
        ("백스물세 명", 123),
        ("이십삼 명", 23),
        ("오명", 5),
        ("천이백삼십사 명", 1234),
        ("약 7명입니다", 7),
        ("7명 정도 보입니다", 7),
        ("총 10명 (남자 7명, 여자 3명)", 10),
        ("사람은 모두 13명이 보입니다.", 13),
        ("사람 수는 7입니다.", 7),
        ("화면에는 서른한 명의 사람이 있습니다.", 31),
        ("2023년 5월 3일 10시 30분, 7명", 7),
        ("일곱 명(7명)입니다", 7),
        ("아무도 없습니다", 0),
        ("아무도 보이지 않습니다.", 0),
        ("사람이 없습니다.", 0),
        ("이 사진에는 사람이 없어요", 0),
        ("한 명도 없습니다", 0),
        ("보이는 사람이 없습니다", 0),
    ],
)
def test_a_stated_count_is_read(answer, count):
    assert parse_count(answer) == count
    # File names and texts from a Mac arrive in decomposed Hangul.
    assert parse_count(unicodedata.normalize("NFD", answer)) == count


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry, I cannot count people.",
        "I can't tell whether there are 7 people.",
        "I'm not sure, maybe 7 people",
        "How many people? 7 people?",
        "죄송하지만 알 수 없습니다.",
        "몇 명인지 셀 수 없습니다.",
        "7명인지 확실하지 않습니다",
        "22222222 people",  # a model that repeats a digit
        "22222명입니다.",
        "7 or 8",
        "7 or 8 people",
        "seven to eight people",
        "between 7 and 8 people",
        "7, maybe 8 people",
        "7-8 people",
        "5~6명",
        "5,6명",
        "5명에서 6명",
        "일곱이나 여덟 명",
        "일곱 여덟 명",
        "대여섯 명",
        "두세 명",
        "열두세 명",
        "10여 명",
        "수십 명",
        "여러 명이 있습니다",
        "at least 7 people",
        "more than 7 people",
        "7 or more people",
        "7+ people",
        "10명 이상",
        "최소 7명",
        "7.5 people",
        "9" * 5000 + " people",
        "-3",
        "3.5",
        "2024",
        "in 2023",
        "10:30",
        "frame 123",
        "7 cars",
        "7%",
        "30분 동안",
        "7번 카메라",
        "There are 7 people. No, 8 people.",
        "3 men and 4 women",
        "7 people on the left and 8 people on the right",
        "many people",
        "dozens of people",
        "a couple of people",
        "이 사람은 남자입니다",
        "이 명단",
        "문이 열려 있습니다",
        "앉아 있는 사람이 없습니다",
        "No one is looking at the camera.",
        "7명이 아닙니다",
        "There are not 7 people.",
        "the 3rd person",
        "세 번째 사람",
        "이 사진은 한 쇼핑몰입니다",
    ],
)
def test_what_states_no_single_count_is_unparsable(answer):
    assert parse_count(answer) is None
