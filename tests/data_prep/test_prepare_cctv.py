"""From raw frames, labels and templates to the dataset: what is accepted, what is rejected and why, who goes where."""

import csv
import hashlib
import json
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import prepare_cctv
import pytest
from conftest import SHARED, run_command
from datasets import DatasetDict
from PIL import Image

from support.raw_data import draw, read_output

QUESTION = "USER: How many people?\nASSISTANT: {count} people.\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten frames with counts 11 to 20 and one template."""
    folder = tmp_path / "raw"
    for number in range(1, 11):
        draw(folder / "frames" / f"seq_{number:06}.jpg", number)
    labels = "".join(f"{number},{10 + number}\n" for number in range(1, 11))
    (folder / "labels.csv").write_text("id,count\n" + labels, encoding="utf-8")
    (folder / "messages.txt").write_text(QUESTION, encoding="utf-8")
    return folder


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Runs the command on a raw folder; returns (dataset, manifest, rejects as (file name, line, reason))."""

    def run(folder: Path, *words: str, output: str = "out"):
        inputs = [
            "--frames",
            folder / "frames",
            "--labels",
            folder / "labels.csv",
            "--messages",
            folder / "messages.txt",
        ]
        argv = ["prepare_cctv.py", *inputs, "--output", tmp_path / output, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        prepare_cctv.main()
        return read_output(tmp_path / output)

    return run


def frame_ids(dataset: DatasetDict) -> dict[str, list[int]]:
    return {name: [int(image_id[4:10]) for image_id in rows["image_id"]] for name, rows in dataset.items()}


NO_GAP = ("--gap", "0")


def test_rows_follow_the_data_contract_and_survive_the_originals(raw, prepare):
    bytes_of_first = (raw / "frames" / "seq_000001.jpg").read_bytes()
    dataset, manifest, rejects = prepare(raw, *NO_GAP)
    for path in (raw / "frames").iterdir():
        path.unlink()
    assert {name: len(rows) for name, rows in dataset.items()} == {"train": 7, "validation": 1, "test": 2}
    assert dataset["train"].column_names == ["messages", "images", "image_id", "count", "id"]
    assert str(dataset["train"].features["count"]) == "Value('int64')"
    row = dataset["train"][0]
    assert row["messages"] == [
        {"role": "user", "content": "How many people?"},
        {"role": "assistant", "content": "11 people."},
    ]
    assert (row["image_id"], row["count"], row["id"]) == ("seq_000001.jpg", 11, "1")
    assert row["images"][0].size == (48, 36)
    stored = dataset["train"].data["images"][0].as_py()[0]
    assert stored == {"bytes": bytes_of_first, "path": "seq_000001.jpg"}
    assert rejects == set()
    assert manifest["rows"] == {"train": 7, "validation": 1, "test": 2}
    assert manifest["sources"][1] == {
        "path": str(raw / "labels.csv"),
        "bytes": (raw / "labels.csv").stat().st_size,
        "sha256": hashlib.sha256((raw / "labels.csv").read_bytes()).hexdigest(),
    }
    assert (manifest["sources"][0]["files"], manifest["arguments"]["gap"]) == (10, 0)


def test_every_frame_that_cannot_be_used_is_in_the_ledger_with_its_reason(raw, prepare, tmp_path):
    frames = raw / "frames"
    whole = (frames / "seq_000001.jpg").read_bytes()
    (frames / "seq_000021.jpg").write_bytes(whole[: len(whole) // 2])
    (frames / "seq_000022.jpg").write_text("<html>no picture</html>")
    (frames / "seq_000023.jpg").write_bytes(whole)
    draw(frames / "seq_000024.png", 24, size=(400, 300))
    (frames / "seq_000025.jpg").symlink_to(draw(tmp_path / "elsewhere" / "x.jpg", 25))
    (frames / "camera").symlink_to(tmp_path / "elsewhere")
    (frames / "again").symlink_to(frames)
    draw(frames / "seq_000026.jpg", 26)
    draw(frames / "seq_000027.jpg", 27)
    (frames / "Thumbs.db").write_bytes(b"\0")
    with (raw / "labels.csv").open("a") as file:
        file.write("21,1\n22,1\n23,1\n24,1\n25,1\n27,many\n")
    _, manifest, rejects = prepare(raw, *NO_GAP, "--max_pixels", "100000")
    assert rejects == {
        ("seq_000021.jpg", "", "corrupt_image"),
        ("seq_000022.jpg", "", "not_an_image"),
        ("seq_000023.jpg", "", "duplicate_image"),
        ("seq_000024.png", "", "oversized_image"),
        ("seq_000025.jpg", "", "outside_folder"),
        ("camera", "", "outside_folder"),
        ("again", "", "not_an_image"),
        ("seq_000026.jpg", "", "unlabelled"),
        ("seq_000027.jpg", "", "label_rejected"),
        ("Thumbs.db", "", "not_an_image"),
        *(("labels.csv", str(line), "frame_rejected") for line in range(12, 17)),
        ("labels.csv", "17", "bad_count"),
    }
    assert manifest["read"]["frames"] == {"read": 20, "accepted": 10, "rejected": 10}
    assert manifest["read"]["labels"] == {"read": 16, "accepted": 10, "rejected": 6}


def test_a_decompression_bomb_is_rejected_by_its_header(raw, prepare):
    bomb = draw(raw / "frames" / "seq_000011.png", 11)
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + bomb.read_bytes()[24:29]
    bomb.write_bytes(bomb.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb.read_bytes()[33:])
    with (raw / "labels.csv").open("a") as file:
        file.write("11,1\n")
    _, _, rejects = prepare(raw, *NO_GAP)
    assert rejects == {("seq_000011.png", "", "oversized_image"), ("labels.csv", "12", "frame_rejected")}


def test_every_label_that_cannot_be_used_is_in_the_ledger_with_its_reason(raw, prepare):
    frames = raw / "frames"
    draw(frames / "a" / "seq_000031.jpg", 31)
    draw(frames / "b" / "seq_000031.jpg", 32)
    for number in (33, 34, 35, 36):
        draw(frames / f"seq_{number:06}.jpg", number)
    (raw / "labels.csv").write_text(
        "id,count,zone\n"
        + "".join(f"seq_{number:06}.jpg,{number}.0,north\n" for number in range(1, 11))
        + "31,5,north\n"  # 12: fits two files
        "a/seq_000031.jpg,6,north\n"  # 13
        "33,-1,north\n34,2.5,north\n"  # 14, 15
        "35,7,north\nseq_000035,7,north\n"  # 16, 17: the same twice
        "36,8,north\n36,9,north\n"  # 18, 19: do not agree
        "99,1,north\n../labels.csv,1,north\n"  # 20, 21
        ",1,north\n1,1\n"  # 22, 23
        '"b/seq_000031.jpg",3,""\n',  # 24: the template wants a zone
        encoding="utf-8",
    )
    (raw / "messages.txt").write_text(QUESTION.replace("people?", "people in the {zone}?"))
    dataset, _, rejects = prepare(raw, "--split", "random")
    assert rejects == {
        ("labels.csv", "12", "ambiguous_frame"),
        ("labels.csv", "14", "bad_count"),
        ("labels.csv", "15", "bad_count"),
        ("labels.csv", "17", "duplicate_label"),
        ("labels.csv", "18", "conflicting_labels"),
        ("labels.csv", "19", "conflicting_labels"),
        ("labels.csv", "20", "missing_frame"),
        ("labels.csv", "21", "outside_folder"),
        ("labels.csv", "22", "missing_frame"),
        ("labels.csv", "23", "wrong_number_of_cells"),
        ("labels.csv", "24", "empty_cell"),
        *((f"seq_{number:06}.jpg", "", "label_rejected") for number in (31, 33, 34, 36)),
    }
    counts = {row["image_id"]: (row["count"], row["zone"]) for rows in dataset.values() for row in rows}
    assert counts["seq_000007.jpg"] == (7, "north")
    assert counts["a/seq_000031.jpg"] == (6, "north")
    assert counts["seq_000035.jpg"] == (7, "north")
    assert len(counts) == 12


def test_every_dialogue_that_cannot_be_used_is_in_the_ledger_with_its_reason(raw, prepare):
    (raw / "frames" / "seq_000050.jpg").write_text("no picture")
    with (raw / "labels.csv").open("a") as file:
        file.write("50,1\n")
    dialogues = {
        None: QUESTION.strip(),
        "bad_template": "USER: {zone} {count:03d}?\nASSISTANT: {count} people.",
        "bad_template ": "USER: Now?\nASSISTANT: {count people.",
        "contradicts_label": "USER: Now?\nASSISTANT: There are 17 people.",
        "contradicts_label ": "IMAGE: 3\n사용자: 몇 명?\n어시스턴트: 열두 명입니다.",
        "roles_do_not_alternate": "USER: One?\nUSER: Two?\nASSISTANT: {count} people.",
        "no_assistant_turn": "USER: How many?",
        "empty_text": "USER:\nASSISTANT: {count} people.",
        "bad_turn": "Just words.\nASSISTANT: {count} people.",
        "missing_frame": "IMAGE: seq_000099.jpg\nUSER: Now?\nASSISTANT: {count} people.",
        "outside_folder": "IMAGE: ../../secret.jpg\nUSER: Now?\nASSISTANT: {count} people.",
        "frame_rejected": "IMAGE: 50\nUSER: Now?\nASSISTANT: {count} people.",
        "bad_image": "IMAGE: 1\nIMAGE: 2\nUSER: Now?\nASSISTANT: {count} people.",
        "image_mark_count": "USER: <image><image>Now?\nASSISTANT: {count} people.",
        "misplaced_image_mark": "USER: Now?\nASSISTANT: <image> {count} people.",
        "duplicate_dialogue": QUESTION.strip(),
    }
    text = "\n\n\n".join(dialogues.values())
    (raw / "messages.txt").write_text(text, encoding="utf-8")
    dataset, manifest, rejects = prepare(raw, *NO_GAP, "--questions_per_frame", "all")
    expected, line = set(), 1
    for reason, dialogue in dialogues.items():
        if reason:
            expected.add(("messages.txt", str(line), reason.strip()))
        line += dialogue.count("\n") + 3
    assert {reject for reject in rejects if reject[0] == "messages.txt"} == expected
    assert manifest["read"]["dialogues"] == {"read": 16, "accepted": 1, "rejected": 15}
    assert sum(len(rows) for rows in dataset.values()) == 10
    with (raw.parent / "out" / "rejects.csv").open(encoding="utf-8-sig", newline="") as file:
        details = {row["line"]: row["detail"] for row in csv.DictReader(file) if row["reason"] == "bad_template"}
    assert details["5"] == (
        "{zone} is no column in braces, expected one of id, count; {count:03d} is no column in braces, expected one of id, count"
    )


def test_columns_of_any_name_can_be_filled_in_and_text_beside_the_pictures_does_not_confuse(raw, prepare):
    (raw / "frames" / "seq_000003.txt").write_text("boxes of some other tool")
    rows = "".join(f"{number},{10 + number},{number},입구\n" for number in range(1, 11))
    (raw / "labels.csv").write_text("frame,count,no. of women,7\n" + rows, encoding="utf-8")
    text = "USER: {7} {{now}}?\nASSISTANT: {count} people.\nUSER: Women?\nASSISTANT: {no. of women} women.\n"
    (raw / "messages.txt").write_text(text)
    dataset, _, rejects = prepare(raw, *NO_GAP)
    assert rejects == {("seq_000003.txt", "", "not_an_image")}
    contents = [message["content"] for message in dataset["test"]["messages"][1]]
    assert contents == ["입구 {now}?", "20 people.", "Women?", "10 women."]


def test_a_dialogue_with_an_image_belongs_to_that_frame_alone(raw, prepare):
    (raw / "messages.txt").write_text(
        QUESTION
        + "\n이미지: seq_000003.jpg\n사용자: 몇 명인가요?\n어시스턴트: 열세 명입니다.\n그중 둘은 앉아 있습니다.\n"
        "사용자: 프레임 {id}인가요?\n어시스턴트: 네.\n",
        encoding="utf-8",
    )
    dataset, _, rejects = prepare(raw, *NO_GAP)
    rows = [row for rows in dataset.values() for row in rows]
    own = [row for row in rows if len(row["messages"]) == 4]
    assert rejects == set()
    assert (len(rows), len(own)) == (11, 1)
    assert own[0]["image_id"] == "seq_000003.jpg"
    assert [message["content"] for message in own[0]["messages"]] == [
        "몇 명인가요?",
        "열세 명입니다.\n그중 둘은 앉아 있습니다.",
        "프레임 3인가요?",
        "네.",
    ]


def test_frames_without_any_dialogue_are_rejected(raw, prepare):
    (raw / "messages.txt").write_text("".join(f"IMAGE: {number}\n{QUESTION}\n" for number in range(1, 10)))
    dataset, _, rejects = prepare(raw, "--split", "ordered", "--train", "5")
    assert rejects == {("seq_000010.jpg", "", "no_dialogue"), ("labels.csv", "11", "frame_rejected")}
    assert frame_ids(dataset) == {"train": [1, 2, 3, 4, 5], "test": [6, 7, 8, 9]}


@pytest.mark.parametrize(
    "conversations",
    [
        [{"role": "user", "content": "몇 명?"}, {"role": "assistant", "content": "{count}명"}],
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "몇 명?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "{count}명"}]},
            ]
        },
        [{"messages": [{"role": "user", "content": "<image>\n몇 명?"}, {"role": "assistant", "content": "{count}명"}]}],
    ],
    ids=["one list of messages", "typed parts", "list of conversations"],
)
def test_json_messages_say_the_same_in_every_form(raw, prepare, conversations):
    (raw / "messages.txt").write_text(json.dumps(conversations, ensure_ascii=False, indent=1), encoding="utf-8")
    dataset, _, rejects = prepare(raw, *NO_GAP)
    assert rejects == set()
    assert dataset["test"]["messages"][0] == [
        {"role": "user", "content": "몇 명?"},
        {"role": "assistant", "content": "19명"},
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_hangul_file_names_in_any_form_and_encoding(raw, prepare, encoding, form):
    for number in range(1, 11):
        name = unicodedata.normalize(form, f"복도{number}.jpg")
        (raw / "frames" / f"seq_{number:06}.jpg").rename(raw / "frames" / name)
    labels = "파일,count,구역\n" + "".join(f"복도{number}.jpg,{number},입구\n" for number in range(1, 11))
    (raw / "labels.csv").write_text(labels, encoding=encoding)
    (raw / "messages.txt").write_text("사용자: {구역}에 몇 명?\n어시스턴트: {count}명\n", encoding=encoding)
    dataset, _, rejects = prepare(raw, *NO_GAP)
    assert rejects == set()
    assert dataset["test"]["count"] == [9, 10]
    assert dataset["test"]["messages"][1][0]["content"] == "입구에 몇 명?"


def test_blocks_keep_the_gap_and_random_does_not(raw_cctv, prepare):
    dataset, manifest, rejects = prepare(raw_cctv, "--gap", "3")
    ids = frame_ids(dataset)
    assert ids == {"train": list(range(1, 37)), "validation": list(range(40, 46)), "test": list(range(49, 61))}
    assert {reason for _, _, reason in rejects} == {"split_gap", "frame_rejected"}
    assert manifest["read"]["frames"] == {"read": 60, "accepted": 54, "rejected": 6}
    between = manifest["leak_report"]["between"]
    assert {pair: found["nearest_frames_apart"] for pair, found in between.items()} == {
        "train/validation": 4,
        "train/test": 13,
        "validation/test": 4,
    }
    assert not between["train/test"]["leaks"]
    dataset, manifest, _ = prepare(raw_cctv, "--split", "random", output="random")
    assert {name: len(rows) for name, rows in dataset.items()} == {"train": 42, "validation": 6, "test": 12}
    found = manifest["leak_report"]["between"]["train/test"]
    assert (found["nearest_frames_apart"], found["images_near_in_time"], found["leaks"]) == (1, 1.0, True)


def test_ordered_keeps_the_published_test_frames(raw_cctv, prepare):
    dataset, manifest, _ = prepare(raw_cctv, "--split", "ordered", "--train", "40")
    assert frame_ids(dataset) == {"train": list(range(1, 41)), "test": list(range(41, 61))}
    assert manifest["rows"] == {"train": 40, "validation": 0, "test": 20}
    words = ("--split", "ordered", "--train", "40", "--validation", "6", "--gap", "4")
    dataset, _, _ = prepare(raw_cctv, *words, output="validated")
    assert frame_ids(dataset) == {
        "train": list(range(1, 31)),
        "validation": list(range(35, 41)),
        "test": list(range(41, 61)),
    }


def test_near_duplicates_across_splits_are_reported(raw, prepare):
    # The last frame is the first one, brighter by a little and encoded again.
    first = Image.open(raw / "frames" / "seq_000001.jpg")
    first.point(lambda value: min(255, value + 4)).save(raw / "frames" / "seq_000010.jpg", quality=70)
    _, manifest, _ = prepare(raw, *NO_GAP)
    found = manifest["leak_report"]["between"]["train/test"]
    assert (found["near_duplicate_pairs"], found["images_with_twin"]) == (1, 0.5)
    assert (found["closest"][0]["train"], found["closest"][0]["test"]) == ("seq_000001.jpg", "seq_000010.jpg")
    assert manifest["leak_report"]["between"]["validation/test"]["near_duplicate_pairs"] == 0


def test_each_folder_is_a_video_of_its_own(raw, prepare):
    east, west = raw / "frames" / "east", raw / "frames" / "west"
    east.mkdir()
    for number in range(1, 11):
        (raw / "frames" / f"seq_{number:06}.jpg").rename(east / f"{number}.jpg")
        draw(west / f"{number}.jpg", 100 + number)
    labels = "".join(f"{side}/{number}.jpg,{number}\n" for side in ("east", "west") for number in range(1, 11))
    (raw / "labels.csv").write_text("file,count\n" + labels)
    dataset, manifest, _ = prepare(raw, "--gap", "1")
    assert dataset["test"]["image_id"][:] == ["east/9.jpg", "east/10.jpg", "west/9.jpg", "west/10.jpg"]
    assert dataset["validation"]["image_id"][:] == ["east/7.jpg", "west/7.jpg"]
    assert manifest["leak_report"]["between"]["train/validation"]["nearest_frames_apart"] == 2


def test_drawn_dialogues_hang_on_the_seed_alone(raw_cctv, prepare):
    first, _, _ = prepare(raw_cctv, output="first")
    again, _, _ = prepare(raw_cctv, output="again")
    other, _, _ = prepare(raw_cctv, "--seed", "1", output="other")
    every, _, _ = prepare(raw_cctv, "--questions_per_frame", "all", output="every")
    assert first["train"]["messages"][:] == again["train"]["messages"][:]
    assert first["train"]["messages"][:] != other["train"]["messages"][:]
    assert len({messages[0]["content"] for messages in first["train"]["messages"]}) == 4
    assert len(every["train"]) == 4 * len(first["train"])


def test_zero_rows_leave_nothing_and_say_why(raw, prepare, tmp_path):
    (raw / "messages.txt").write_text("USER: Hello?\n")
    with pytest.raises(
        ValueError, match=r"(?s)no row was accepted.*no_assistant_turn x 1, first: .*messages\.txt:1"
    ) as error:
        prepare(raw, *NO_GAP)
    assert "no_dialogue x 10" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_too_few_frames_for_the_gap_say_what_to_change(raw, prepare):
    with pytest.raises(ValueError, match=r"frames: 10 usable frames are too few .* smaller --gap"):
        prepare(raw)


def test_a_split_that_fails_for_want_of_frames_says_what_was_rejected(raw, prepare):
    (raw / "labels.csv").write_text("id,count\n1,5\n2,two\n3,three\n")
    with pytest.raises(ValueError, match=r"(?s)1 usable frames are too few.*bad_count x 2, first: .*labels.csv:3"):
        prepare(raw, *NO_GAP)


def test_unusable_files_are_named(raw, prepare):
    (raw / "labels.csv").write_text("1,29\n2,30\n")
    with pytest.raises(
        ValueError, match=r"labels\.csv opens with the columns 1, 29: expected their names in the first line"
    ):
        prepare(raw)
    (raw / "labels.csv").write_text("image,count,text\n1,3,x\n")
    with pytest.raises(ValueError, match="text means something else to training"):
        prepare(raw)
    (raw / "labels.csv").write_text("id,count\n1,3\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"labels\.csv holds NUL bytes.*save it as UTF-8"):
        prepare(raw)
    (raw / "labels.csv").write_text("id,count\n1,3\n")
    (raw / "messages.txt").write_bytes(b"USER: ok\n\xff\xff\xff\n")
    with pytest.raises(ValueError, match=r"messages\.txt is neither UTF-8 nor CP949 \(line 2\)"):
        prepare(raw)
    (raw / "messages.txt").write_text('[\n{"messages": [}\n]')
    with pytest.raises(ValueError, match=r"messages\.txt:2 is not JSON"):
        prepare(raw)


@pytest.mark.slow
def test_all_mistakes_in_the_arguments_are_told_at_once_without_a_stack_trace(raw, tmp_path):
    result = run_command(
        *("data_prep/prepare_cctv.py", "--frames", raw / "nowhere", "--labels", raw / "labels.csv"),
        *("--messages", raw / "none.txt", "--output", tmp_path / "out", "--split", "ordered", "--test_size", "0.1"),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"prepare_cctv.py: --frames {raw / 'nowhere'} is not a folder",
        f"--messages {raw / 'none.txt'} is not a file",
        "--test_size means nothing with --split ordered: leave it out",
        "--split ordered needs --train: how many frames to learn from",
    ]


def test_an_existing_output_is_left_as_it_is(raw, prepare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="already exists and is never overwritten"):
        prepare(raw, *NO_GAP)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "mall").is_dir(), reason="the mall frames are not at ../shared/data/mall")
def test_the_real_mall_frames_go_through_whole(raw, prepare, tmp_path):
    mall = tmp_path / "mall"
    mall.mkdir()
    (mall / "frames").symlink_to((SHARED / "mall" / "frames").resolve())
    (mall / "labels.csv").write_bytes((SHARED / "mall" / "labels.csv").read_bytes())
    (mall / "messages.txt").write_text(
        QUESTION + "\n사용자: 몇 명인가요?\n어시스턴트: {count}명입니다.\n", encoding="utf-8"
    )
    dataset, manifest, rejects = prepare(mall, "--split", "ordered", "--train", "800")
    assert rejects == set()
    assert manifest["rows"] == {"train": 800, "validation": 0, "test": 200}
    assert manifest["leak_report"]["between"]["train/test"]["images_near_in_time"] == 0.05  # frames 801 to 810
    truth = np.array(dataset["test"]["count"])
    assert np.median(dataset["train"]["count"]) == 29
    assert round(float(np.abs(truth - 29).mean()), 2) == 5.88
