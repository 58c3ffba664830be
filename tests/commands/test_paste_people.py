"""Crowds pasted from a camera's own frames carry the number that was pasted."""

import csv

import numpy as np
import pytest
from conftest import must_run, run_command
from PIL import Image

from benchmarks.paste_people import COLUMNS, FEET, ROWS, TALL

SIZE = (200, 160)


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """40 frames of a wall on which 3 bright figures of a person's height stand apart, and their labels."""
    folder = tmp_path_factory.mktemp("camera")
    (folder / "frames").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        frame = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)
        for third in range(3):
            feet = int(rng.integers(90, 150))
            tall = round(np.interp(feet / SIZE[1], FEET, TALL) * SIZE[1])
            left = 10 + 63 * third + int(rng.integers(0, 25))
            frame[feet - tall : feet, left : left + round(tall * 0.35)] = (230, 40 * third, 20)
        Image.fromarray(frame).save(folder / "frames" / f"{number:03}.png")
    (folder / "labels.csv").write_text("id,count\n" + "".join(f"{n + 1},3\n" for n in range(40)))
    return folder


def figures(path) -> int:
    """How many separate figures a written frame shows."""
    from scipy import ndimage

    with Image.open(path) as image:
        red = np.asarray(image.convert("RGB")).astype(int)[..., 0]
    return ndimage.label(ndimage.binary_opening(red > 160, iterations=2))[1]


def paste(camera, output, *flags, first=40):
    words = ["--frames", camera / "frames", "--first", str(first), "--output", output, *flags]
    must_run("benchmarks/paste_people.py", *words, by=run_command)
    with (output / "labels.csv").open() as file:
        return [
            {name: int(value) if value.isdigit() else value for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def test_people_over_the_empty_scene_are_counted_in_the_frame_and_its_parts(camera, tmp_path):
    rows = paste(camera, tmp_path / "pasted", "--number", "12", "--most", "3")
    assert {row["count"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert row["count"] == sum(row[f"{y}_{x}"] for y in ROWS for x in COLUMNS)
        assert figures(tmp_path / "pasted" / "frames" / f"{row['id']:06}.jpg") <= row["count"]
        assert [line[0] for line in row["grid"].split()] == list("abcdefg")
        assert sum(int(digit) for line in row["grid"].split() for digit in line[1:]) == row["count"]
    empty = next(row["id"] for row in rows if row["count"] == 0)
    assert figures(tmp_path / "pasted" / "frames" / f"{empty:06}.jpg") == 0
    folder, output = tmp_path / "pasted", tmp_path / "data"
    must_run(
        *("data_prep/prepare_cctv.py", "--frames", folder / "frames", "--labels", folder / "labels.csv", "--gap", "0"),
        *("--messages", folder / "messages.txt", "--output", output, "--split", "ordered", "--train", "10"),
        by=run_command,
    )
    with (output / "rejects.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == []


def test_who_is_painted_over_leaves_the_label_too(camera, tmp_path):
    rows = paste(camera, tmp_path / "changed", "--number", "40", "--labels", str(camera / "labels.csv"))
    counts = {row["count"] for row in rows}
    assert min(counts) < 3 < max(counts)
    fewer = [row for row in rows if row["count"] < 3]
    assert all(figures(tmp_path / "changed" / "frames" / f"{row['id']:06}.jpg") <= row["count"] for row in fewer)


def test_later_frames_follow_unchanged_and_what_is_subtracted_leaves_grey(camera, tmp_path):
    flags = ("--number", "4", "--labels", str(camera / "labels.csv"), "--size", "160x160", "--subtract")
    rows = paste(camera, tmp_path / "both", *flags, "--gap", "2", first=30)
    assert [row["id"] for row in rows] == list(range(1, 13))
    assert [row["count"] for row in rows[4:]] == [3] * 8
    for number in range(5, 13):
        with Image.open(tmp_path / "both" / "frames" / f"{number:06}.jpg") as image:
            difference = np.asarray(image).astype(int) - 128
        assert image.size == (160, 160)
        assert (np.abs(difference).max(-1) < 12).mean() > 0.7  # the wall
        assert (difference[..., 0] > 50).any()  # (230 - 90) / 2 where a figure stands


def test_frames_without_anybody_alone_are_refused(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "frames" / "1.png")
    words = ["--frames", tmp_path / "frames", "--first", "1", "--output", tmp_path / "out"]
    result = run_command("benchmarks/paste_people.py", *words)
    assert result.returncode == 1
    assert "person standing alone" in result.stderr
