"""Which row of a table belongs to which frame: what is read, what is asked, and that no label lands on another frame."""

import pytest
from PIL import Image

from preparing.cctv import find_frames
from preparing.frame_names import FrameIndex
from preparing.labels import Labels, match_labels, read_label_table

SEQUENCE = [f"seq_{number:06}.jpg" for number in range(1, 5)]


@pytest.fixture
def read(tmp_path):
    """Reads a table for frames of the given names; returns ({image_id: count}, what was read)."""

    def run(
        names: list[str], table: str, *, number_offset: int | None = None, **flags
    ) -> tuple[dict[str, int], Labels]:
        folder = tmp_path / "frames"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6)).save(folder / name)
        (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
        frames = find_frames(folder)
        index = FrameIndex(frames, folder, number_offset)
        labels = read_label_table(tmp_path / "labels.csv", index, **flags)
        match_labels(labels, index, flags.get("one_row_per"))
        labelled = [frame for frame in frames if frame.label and not frame.label.problem]
        return {frame.image_id: frame.label.count for frame in labelled}, labels

    return run


def table(header: str, *rows: object) -> str:
    return "".join(f"{line}\n" for line in (header, *rows))


RIGHT = dict(zip(SEQUENCE, (10, 20, 30, 40), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        table("id,count", *(f"{n},{10 * n}" for n in range(1, 5))),
        table("id;count", *(f"{n};{10 * n},0" for n in range(1, 5))),
        table("sep=;", "id;count", *(f"{n};{10 * n}" for n in range(1, 5))),
        table("frame\tCount", *(f"{n:03}\t{10 * n}.0" for n in range(1, 5))),
        table("people,image", *(f"{10 * n},seq_{n:06}.jpg" for n in range(1, 5))),
        table("파일,인원수", *(f"SEQ_{n:06},{10 * n}" for n in range(1, 5))),
        table("Unnamed: 0,filename,count", *(f"{n - 1},seq_{n:06}.jpg,{10 * n}" for n in range(1, 5))),
        table(",filename,count", *(f"{n - 1},seq_{n:06}.jpg,{10 * n}" for n in range(1, 5))),
        table("id,frame_name,count", *(f"{5 - n},seq_{n:06},{10 * n}" for n in range(1, 5))),
        table("index,frame,count", *(f"{n - 1},{n},{10 * n}" for n in range(1, 5))),
        table("file,count", *(f"C:\\data\\frames\\seq_{n:06}.jpg,{10 * n}" for n in range(1, 5))),
        table("file,count", *(f"1f2e3d4c-seq_{n:06}.jpg,{10 * n}" for n in range(1, 5))),
        table("file,count,", *(f"seq_{n:06}.jpg,{10 * n}," for n in range(1, 5))),
    ],
)
def test_tables_of_many_tools_say_the_same(read, text):
    assert read(SEQUENCE, text)[0] == RIGHT


def test_how_frames_are_found_is_told_with_examples(read):
    _, labels = read(SEQUENCE, table("id,count", *(f"{n},{n}" for n in range(1, 5))))
    assert labels.rules == [
        "people are counted in the column 'count'",
        "frames are named by the column 'id'",
        "labels find their frames by number (4): 1 -> seq_000001.jpg, 2 -> seq_000002.jpg, 3 -> seq_000003.jpg, "
        "4 -> seq_000004.jpg",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["seq_000001_jpg.rf.0ab4.jpg", "seq_000002_jpg.rf.9cd1.jpg", "seq_000003_jpg.rf.7ef3.jpg"],
        ["seq_000001_png.rf.Q1w2E3r4T5y6.jpg", "seq_000002_png.rf.0.jpg", "seq_000003_png.rf.11111111.jpg"],
        ["1f2e3d4c-seq_000001.jpg", "0a1b2c3d-seq_000002.jpg", "99aa88bb-seq_000003.jpg"],
        ["seq_000001-3f2a9b1c0d.jpg", "seq_000002-11223344ee.jpg", "seq_000003-a1a1a1a1.jpg"],
        [f"seq_00000{n}_{n}f2b1c4d-9e8f-4a3b-8c2d-1e0f9a8b7c6d.jpg" for n in (1, 2, 3)],
    ],
)
@pytest.mark.parametrize("key", ["{}", "seq_{:06}", "seq_{:06}.jpg", "seq_{:06}.png"])
def test_hashes_of_tools_are_no_part_of_a_name(read, names, key):
    text = table("frame,count", *(f"{key.format(number)},{10 * number}" for number in (1, 2, 3)))
    counts, labels = read(names, text)
    assert counts in ({}, dict(zip(names, (10, 20, 30), strict=True)))
    if key != "seq_{:06}.png" and key != "seq_{:06}.jpg":
        assert len(counts) == 3
    assert all(label.problem[0] == "missing_frame" for label in labels.items if label.problem)


def test_digits_of_hashes_name_no_frame(read):
    names = ["0ab4.jpg", "9cd1.jpg", "7ef3.jpg", "ab2.jpg", "seq_000001-77.jpg"]
    counts, labels = read(names, table("id,count", "1,10", "2,20", "3,30", "4,40", "77,50"))
    assert counts == {}
    assert {label.problem[0] for label in labels.items} == {"missing_frame"}
    uuids = [f"550e8400-e29b-41d4-a716-4466554400{number:02}.jpg" for number in (0, 1)]
    counts, labels = read(uuids, table("id,count", "446655440000,10", "446655440001,20"))
    assert counts == {}


def test_a_name_with_another_hash_is_another_picture(read):
    counts, _ = read(["a_1_jpg.rf.aaa1.jpg"], table("file,count", "a_1_jpg.rf.bbb2.jpg,7"))
    assert counts == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (table("frame,filename,count", "1,seq_000002.jpg,5"), "names two frames: filename 'seq_000002.jpg'"),
        (
            table("image,file,count", "seq_000001.jpg,seq_000002.jpg,5"),
            "--frame_column 'image' or --frame_column 'file'",
        ),
        (table("id,frame,count", "1,2,5"), "names two frames: id '1' is seq_000001.jpg, but frame '2'"),
        (table("men,women,count", "1,1,2"), "none is known to name the frame: say which, with --frame_column"),
        (
            table("image,people,heads", "1,1,2"),
            "people and heads could each be the number of people: name it with --count",
        ),
        (
            table("image,number of cars", "1,1"),
            "called count; none is the number of people: name it with --count_column",
        ),
        (table("id,count", "0,1", "1,2", "2,3", "3,4"), "say --number_offset 1; .* say --number_offset 0"),
        (table("id,count", "2,1", "3,2", "4,3", "5,4"), "say --number_offset -1"),
        (table("id,count", "101,1", "102,2", "103,2"), "say --number_offset -100"),
        (table("seq_000001.jpg,10", "seq_000002.jpg,20"), "expected their names in the first line"),
        (table("file,region,count", "1,0,1", "2,0,1", "2,1,1"), "--one_row_per person .* --one_row_per region"),
    ],
)
def test_what_could_mean_two_things_is_asked(read, text, told):
    with pytest.raises(ValueError, match=told):
        read(SEQUENCE, text)


def test_flags_answer_the_questions(read):
    off_by_one = table("id,count", "0,10", "1,20", "2,30", "3,40")
    assert read(SEQUENCE, off_by_one, number_offset=1)[0] == RIGHT
    counts, labels = read(SEQUENCE, off_by_one, number_offset=0)
    assert counts == dict(zip(SEQUENCE, (20, 30, 40), strict=False))
    assert [label.problem and label.problem[0] for label in labels.items] == ["missing_frame", None, None, None]
    two_names = table("image,file,heads,people", "1,2,10,99")
    assert read(SEQUENCE, two_names, frame_column="file", count_column="heads")[0] == {SEQUENCE[1]: 10}
    rows = table("file,region,count", "1,0,1", "2,0,1", "2,1,1")
    assert read(SEQUENCE, rows, one_row_per="person")[0] == {SEQUENCE[0]: 1, SEQUENCE[1]: 2}
    assert read(SEQUENCE, rows, one_row_per="region")[0] == {SEQUENCE[0]: 1, SEQUENCE[1]: 1}
    with pytest.raises(ValueError, match="also has a column called count"):
        read(SEQUENCE, table("id,count,people", "1,2,3"), count_column="people")


def test_a_gap_among_the_frames_is_no_reason_to_ask(read):
    counts, _ = read(
        [SEQUENCE[0], SEQUENCE[2], SEQUENCE[3]], table("id,count", *(f"{n},{10 * n}" for n in range(1, 5)))
    )
    assert counts == {name: count for name, count in RIGHT.items() if name != SEQUENCE[1]}


def test_rows_of_regions_are_one_label_only_where_all_counts_agree(read):
    agreeing = table("file,region,zone,count", "1,0,a,1", "2,0,a,2", "2,1,a,2")
    counts, labels = read(SEQUENCE, agreeing)
    assert counts == {SEQUENCE[0]: 1, SEQUENCE[1]: 2}
    assert (labels.items[1].values["region"], labels.items[1].values["zone"]) == ("", "a")
    assert labels.items[1].differing == {"region"}
    assert labels.items[2].problem[0] == "duplicate_label"
    # Two regions with 2 people each, beside regions that differ: the counts are of regions.
    counts, labels = read(SEQUENCE, table("file,region,count", "1,0,2", "1,1,2", "2,0,2", "2,1,3", "3,0,7"))
    assert counts == {SEQUENCE[2]: 7}
    assert [label.problem[0] for label in labels.items[:4]] == ["conflicting_labels"] * 4
    assert "write one row for each frame, with their sum" in labels.items[0].problem[1]


def test_a_column_may_name_the_video(read):
    names = [f"cam{camera}/{number:04}.jpg" for camera in (1, 2) for number in (1, 2)]
    text = table("camera,frame,count", "cam1,1,11", "cam2,1,21", "cam3,2,32")
    counts, labels = read(names, text)
    assert counts == {"cam1/0001.jpg": 11, "cam2/0001.jpg": 21}
    assert labels.items[2].problem[0] == "missing_frame"


def test_series_in_one_folder_are_videos_too(read):
    names = [f"cam{camera}_{number:04}.jpg" for camera in (1, 2) for number in (1, 2)]
    assert read(names, table("camera,frame,count", "cam1,1,11", "cam2,1,21"))[0] == {names[0]: 11, names[2]: 21}
    _, labels = read(names, table("frame,count", "1,5"))
    assert labels.items[0].problem[0] == "ambiguous_frame"


@pytest.mark.parametrize("folder", ["cam3", "elsewhere"])
def test_a_label_of_another_folder_lands_nowhere(read, folder):
    counts, _ = read(
        ["cam1/7.jpg", "cam2/8.jpg"], table("file,count", f"/data/{folder}/7.jpg,5", f"/data/{folder}/8.jpg,6")
    )
    assert counts == {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04....", "Excel workbook .* Save As, CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0....", r"old Excel workbook \(.xls\)"),
        (b"\x1f\x8b....", "compressed by gzip"),
        (b"PAR1....", "a Parquet file"),
        (b"", r"opens with the columns \(none\)"),
        (b"just words\n1\n", "opens with the columns just words"),
        (b"id,count,count\n1,2,3\n", "every column to have a name of its own"),
    ],
)
def test_what_is_no_table_is_named_with_what_to_do(read, tmp_path, content, told):
    index = FrameIndex([], tmp_path)
    path = tmp_path / "labels.xlsx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_label_table(path, index)


def test_a_long_table_is_read_whole(read):
    lines = "".join(f"{number},{number % 50}\n" for number in range(1, 20_001))
    counts, labels = read(SEQUENCE, "id,count\n" + lines, number_offset=0)
    assert len(labels.items) == 20_000
    assert counts == dict(zip(SEQUENCE, (1, 2, 3, 4), strict=True))
