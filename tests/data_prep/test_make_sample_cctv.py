"""The drawn video: same seed, same bytes; labels that say what was drawn; a range that every stretch of it covers."""

import csv
import sys

import make_sample_cctv
import numpy as np
import pytest
from make_sample_cctv import MAX_PEOPLE, MESSAGES, Walker, crowd_sizes, draw_arcade, draw_frame
from PIL import Image

from finetuning.tasks.count_parser import parse_count


@pytest.fixture
def make(monkeypatch, tmp_path):
    def run(name: str, *words: str):
        monkeypatch.setattr(sys, "argv", ["make_sample_cctv.py", "--output", str(tmp_path / name), *words])
        make_sample_cctv.main()
        return tmp_path / name

    return run


def test_the_same_seed_gives_the_same_bytes(make):
    first, again, other = (
        make("a", "--frames", "5"),
        make("b", "--frames", "5"),
        make("c", "--frames", "5", "--seed", "1"),
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        *(f"frames/seq_{number:06}.jpg" for number in range(1, 6)),
        "labels.csv",
        "messages.txt",
    ]
    assert all((first / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert (first / files[0]).read_bytes() != (other / files[0]).read_bytes()
    with Image.open(first / files[0]) as image:
        assert (image.size, image.format) == ((160, 120), "JPEG")
    with (first / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(1 <= int(row["count"]) <= MAX_PEOPLE for row in rows)


def test_an_existing_output_is_refused(make):
    make("a", "--frames", "1")
    with pytest.raises(ValueError, match="already exists and is never overwritten"):
        make("a", "--frames", "1")


def test_every_stretch_sees_most_counts_and_neighbours_differ_little():
    for seed in range(5):
        counts = np.array(crowd_sizes(400, np.random.default_rng(seed)))
        assert (counts.min(), counts.max()) == (1, 20)
        for start in range(0, 400, 40):
            assert np.ptp(counts[start : start + 40]) >= 13
        assert np.abs(np.diff(counts)).mean() < 1.5


def test_a_figure_is_drawn_for_every_walker():
    size = (160, 120)
    places = [(x, y) for x in (0.1, 0.4, 0.7) for y in (0.2, 0.8)]
    walkers = [Walker(x, y, 0, 0, "#1b3a6b", "#1c1410", 1.0) for x, y in places]
    empty = draw_arcade(480, 360)
    changed = []
    for number in range(len(walkers) + 1):
        frame = draw_frame(empty, walkers[:number], size, 1.0, np.random.default_rng(0))
        background = draw_frame(empty, [], size, 1.0, np.random.default_rng(0))
        difference = np.abs(np.asarray(frame, dtype=int) - np.asarray(background, dtype=int)).max(axis=2) > 30
        assert not difference[:, :20].any() and not difference[:, 140:].any()  # all inside the middle square
        changed.append(int(difference.sum()))
    assert changed[0] == 0
    # Walkers that do not touch: each adds its own silhouette of well over 60 pixels.
    assert min(np.diff(changed)) > 60


def test_the_answers_can_be_scored():
    answers = [line.partition(":")[2] for line in MESSAGES.splitlines() if line.startswith(("ASSISTANT", "어시스턴트"))]
    assert len(answers) == 4
    for count in range(MAX_PEOPLE + 1):
        assert {parse_count(answer.format(count=count)) for answer in answers} == {count}
