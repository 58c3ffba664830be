"""Videos, days and photos: what goes to which side, and what the gaps between the sides cost."""

import sys

import numpy as np
import prepare_cctv
import pytest

from preparing import splits
from preparing.cctv import find_frames
from preparing.splits import split_videos, split_whole
from support.raw_data import draw, read_output

MESSAGES = "USER: How many?\nASSISTANT: {count} people.\n"


@pytest.fixture
def prepare(monkeypatch, tmp_path, capsys):
    """Prepares frames of the given names with labels of the given columns; ({split: image ids}, manifest, what was said)."""

    def run(names: list[str], *words: str, columns: dict[str, list[str]] | None = None):
        for place, name in enumerate(names):
            draw(tmp_path / "frames" / name, place)
        header = ["file", "count", *(columns or {})]
        rows = [
            [name, str(place), *(column[place] for column in (columns or {}).values())]
            for place, name in enumerate(names)
        ]
        lines = "".join(",".join(row) + "\n" for row in (header, *rows))
        (tmp_path / "labels.csv").write_text(lines, encoding="utf-8")
        (tmp_path / "messages.txt").write_text(MESSAGES, encoding="utf-8")
        inputs = ["--frames", tmp_path / "frames", "--labels", tmp_path / "labels.csv"]
        inputs += ["--messages", tmp_path / "messages.txt", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("prepare_cctv.py", *inputs, *words)])
        prepare_cctv.main()
        dataset, manifest, _ = read_output(tmp_path / "out")
        return {name: rows["image_id"][:] for name, rows in dataset.items()}, manifest, capsys.readouterr().out

    return run


def videos_and_times(folder) -> dict[str, tuple[str, int]]:
    return {frame.image_id: (frame.video, frame.time) for frame in find_frames(folder)}


@pytest.mark.parametrize(
    ("names", "videos", "times"),
    [
        (["a_1.jpg", "a_2.jpg", "a_5.jpg"], [".", ".", "."], [1, 2, 5]),
        (["cam1_20251129_100000.jpg", "cam1_20251130_100002.jpg"], ["./cam1_20251129", "./cam1_20251130"], [0, 0]),
        (
            ["20251129100000.jpg", "20251129100500.jpg", "20251130100000.jpg"],
            ["./20251129"] * 2 + ["./20251130"],
            [0, 1, 0],
        ),
        (["x 2025-11-29 10.00.00.jpg", "x 2025-11-29 10.00.09.jpg"], ["./x 2025-11-29"] * 2, [0, 1]),
        (["29.11.2025-1.jpg", "30.11.2025-2.jpg"], ["./29.11.2025", "./30.11.2025"], [0, 0]),
        (["251129_100000.jpg", "251130_100000.jpg"], ["./251129", "./251130"], [0, 0]),
        (["1764410400.jpg", "1764410460.jpg", "1764496800.jpg"], ["./2025-11-29"] * 2 + ["./2025-11-30"], [0, 1, 0]),
        (["c1_1.jpg", "c1_2.jpg", "c2_1.jpg", "c2_9.jpg"], ["./c1"] * 2 + ["./c2"] * 2, [1, 2, 1, 9]),
        (["cam_29Nov2025_1.jpg", "cam_30Nov2025_1.jpg"], ["./cam_29nov2025", "./cam_30nov2025"], [0, 0]),
        (
            ["1층_2025년11월29일_1.jpg", "1층_2025년11월30일_1.jpg"],
            ["./1층_2025년11월29일", "./1층_2025년11월30일"],
            [0, 0],
        ),
        (["hall.jpg", "lobby.jpg", "stairs.jpg"], [".", ".", "."], [0, 1, 2]),
        (["seq_20261345.jpg", "seq_20261346.jpg"], [".", "."], [20261345, 20261346]),
    ],
)
def test_file_names_tell_videos_and_times(tmp_path, names, videos, times):
    for place, name in enumerate(names):
        draw(tmp_path / name, place)
    assert videos_and_times(tmp_path) == dict(zip(names, zip(videos, times, strict=True), strict=True))


def test_two_days_leak_nothing(prepare):
    ids, manifest, said = prepare(
        ["cam1_20251129_100000.jpg", "cam1_20251130_100002.jpg"],
        *("--validation_size", "0", "--test_size", "0.5"),
    )
    assert sorted(map(len, ids.values())) == [1, 1]
    assert manifest["leak_report"]["between"]["train/test"]["leaks"] is False
    assert "LEAK" not in said


def test_short_clips_go_whole_to_one_side(prepare):
    clips = [[f"clip{clip:02}/{number}.jpg" for number in range(1, 5)] for clip in range(1, 11)]
    ids, manifest, said = prepare([name for clip in clips for name in clip])
    assert {name: len(of_split) for name, of_split in ids.items()} == {"train": 28, "validation": 4, "test": 8}
    for clip in clips:
        assert [set(clip) <= set(of_split) for of_split in ids.values()].count(True) == 1
    assert "10 of the videos are too short for that and went whole to one side" in manifest["split_rule"]
    assert "gap" not in said.lower().replace("split_gap", "")


def test_a_column_says_what_one_video_is(prepare):
    names = [f"{number:04}.jpg" for number in range(1, 41)]
    days = [["mon", "tue", "wed", "thu"][place % 4] for place in range(40)]
    ids, _, _ = prepare(names, "--split", "groups", "--group_by", "day", "--test_size", "0.3", columns={"day": days})
    day_of = dict(zip(names, days, strict=True))
    sides = {name: {day_of[image_id] for image_id in of_split} for name, of_split in ids.items()}
    assert sorted(map(len, sides.values())) == [1, 1, 2]
    assert not set.intersection(*sides.values())


def test_too_few_videos_are_named(prepare):
    with pytest.raises(ValueError, match=r"2 videos \(east, west\) leave none for train: leave validation out"):
        prepare(["east/1.jpg", "west/1.jpg"], "--split", "groups")


def test_a_group_column_that_is_not_there_is_named(prepare):
    with pytest.raises(ValueError, match="--group_by 'camera': expected folder, or one of the columns file, count"):
        prepare(["1.jpg", "2.jpg"], "--split", "groups", "--group_by", "camera")


def test_photos_of_one_folder_raise_no_false_alarm(prepare):
    _, manifest, said = prepare([f"IMG_{number}.jpg" for number in range(1, 41)], "--split", "random")
    assert manifest["leak_report"]["between"]["train/test"]["leaks"] is False
    assert "LEAK" not in said


def test_photos_in_groups_lose_none(prepare):
    ids, manifest, _ = prepare([f"IMG_{number}.jpg" for number in range(1, 41)], "--split", "groups")
    assert {name: len(of_split) for name, of_split in ids.items()} == {"train": 28, "validation": 4, "test": 8}
    assert manifest["split_rule"] == "40 groups of look-alikes to one side each, seed 0"


def test_a_costly_gap_is_told_with_what_to_do(prepare):
    _, _, said = prepare([f"seq_{number}.jpg" for number in range(1, 41)])
    assert (
        "the gaps between the splits leave out 20 of 40 frames (50%): a --gap smaller than 10 leaves out fewer" in said
    )
    assert "--split groups" in said


def test_long_videos_are_cut_and_short_ones_stay_whole():
    videos = {"long": list(range(100)), "short": [200, 201, 202], "also short": [300]}
    splits, in_gap, num_whole = split_videos(videos, 0.1, 0.2, 5, seed=0)
    assert (len(in_gap), num_whole) == (10, 2)
    assert splits["test"][:20] == list(range(80, 100))
    assert sum(map(len, splits.values())) == 94
    with pytest.raises(ValueError, match=r"(?s)a: 3 usable frames.*b: 3 usable frames"):
        split_videos({"a": [1, 2, 3], "b": [4, 5, 6]}, 0.1, 0.2, 5, seed=0)


def test_every_side_gets_a_clip_where_there_are_enough():
    splits = split_whole([[1] * 30, [2] * 31, [3] * 32], 0.1, 0.2, seed=0, fill=True)
    assert sorted(map(len, splits.values())) == [30, 31, 32]


@pytest.mark.parametrize("held", [1, 10**6])
def test_pairs_in_blocks_join_what_they_join_at_once(monkeypatch, held):
    monkeypatch.setattr(splits, "PAIRS_HELD", held)
    blocks = [np.array(block).reshape(-1, 2) for block in ([], [(4, 1), (6, 5)], [(0, 4)], [(5, 3)], [(3, 3)])]
    assert splits.connected_groups(8, blocks) == [[0, 1, 4], [2], [3, 5, 6], [7]]
