"""Conversations in every form people have them in, to the same rows; every reason for which one is rejected."""

import json
import sys
import unicodedata
from pathlib import Path

import datasets
import prepare_conversations
import pytest
from conftest import run_command
from PIL import Image

from preparing.images import find_inside
from support.raw_data import draw, read_output


@pytest.fixture
def images(tmp_path) -> Path:
    for number in range(1, 21):
        draw(tmp_path / "images" / "coco" / f"{number:012}.jpg", number)
    return tmp_path / "images"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    def run(source: Path, *words: str | Path, output: str = "out"):
        argv = ["prepare_conversations.py", "--input", source, "--output", tmp_path / output, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        prepare_conversations.main()
        return read_output(tmp_path / output)

    return run


def llava_record(number: int) -> dict:
    """As docs/Finetune_Custom_Data.md of the LLaVA repository writes it."""
    return {
        "id": f"record-{number}",
        "image": f"coco/{number:012}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is in picture {number}?"},
            {"from": "gpt", "value": f"Noise number {number}."},
        ],
    }


def save_json(path: Path, records) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def all_rows(dataset) -> dict[str, dict]:
    return {row["image_id"]: row for rows in dataset.values() for row in rows}


WANTED = [{"role": "user", "content": "What is in picture 7?"}, {"role": "assistant", "content": "Noise number 7."}]


def test_llava_json_as_its_repository_documents_it(tmp_path, images, prepare):
    source = save_json(tmp_path / "data.json", [llava_record(number) for number in range(1, 21)])
    dataset, manifest, rejects = prepare(source, "--images", images)
    assert rejects == set()
    assert {name: len(rows) for name, rows in dataset.items()} == {"train": 16, "validation": 2, "test": 2}
    assert dataset["train"].column_names == ["messages", "images", "image_id"]
    row = all_rows(dataset)["coco/000000000007.jpg"]
    assert row["messages"] == WANTED
    assert row["images"][0].size == (48, 36)
    assert manifest["read"] == {"records": {"read": 20, "accepted": 20, "rejected": 0}}
    assert [found["near_duplicate_pairs"] for found in manifest["leak_report"]["between"].values()] == [0, 0, 0]


def as_messages(number: int) -> dict:
    turns = llava_record(number)["conversations"]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    return {"messages": messages, "images": [llava_record(number)["image"]]}


def as_typed_parts(number: int) -> dict:
    question, answer = (message["content"] for message in as_messages(number)["messages"])
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.partition("\n")[2]}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [llava_record(number)["image"]],
    }


def as_vsft_parts(number: int) -> dict:
    """The form of HuggingFaceH4/llava-instruct-mix-vsft."""
    question, answer = (message["content"] for message in as_messages(number)["messages"])
    parts = [
        {"index": None, "text": question.partition("\n")[2], "type": "text"},
        {"index": 0, "text": None, "type": "image"},
    ]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"index": None, "text": answer, "type": "text"}]},
        ],
        "images": [llava_record(number)["image"]],
    }


@pytest.mark.parametrize("form", [as_messages, as_typed_parts, as_vsft_parts])
def test_json_lines_of_messages(tmp_path, images, prepare, form):
    source = tmp_path / "data.jsonl"
    source.write_text("".join(json.dumps(form(number)) + "\n" for number in range(1, 21)))
    dataset, _, rejects = prepare(source, "--images", images)
    assert rejects == set()
    assert all_rows(dataset)["coco/000000000007.jpg"]["messages"] == WANTED


@pytest.mark.parametrize("save", ["save_to_disk", "parquet"])
def test_datasets_that_hold_their_images(tmp_path, images, prepare, save):
    rows = [as_vsft_parts(number) for number in range(1, 21)]
    for row in rows:
        row["images"] = [Image.open(images / name) for name in row["images"]]
    held = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    source = tmp_path / "held"
    if save == "parquet":
        source.mkdir()
        held.to_parquet(source / "train-00000-of-00001.parquet")
    else:
        datasets.DatasetDict({"train": held}).save_to_disk(source)
    dataset, manifest, rejects = prepare(source)
    assert rejects == set()
    row = next(row for row in all_rows(dataset).values() if row["messages"] == WANTED)
    assert row["images"][0].tobytes() == Image.open(images / "coco" / "000000000007.jpg").tobytes()
    assert (manifest["sources"][0]["rows"], manifest["rows"]["train"]) == (20, 16)


@pytest.mark.parametrize(("on_disk", "in_text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_hangul_file_names_in_either_form(tmp_path, images, prepare, on_disk, in_text):
    records = [llava_record(number) for number in range(1, 11)]
    for number, record in enumerate(records, start=1):
        path = images / record["image"]
        path.rename(path.with_name(unicodedata.normalize(on_disk, f"복도{number}.jpg")))
        record["image"] = unicodedata.normalize(in_text, f"coco/복도{number}.jpg")
    dataset, _, rejects = prepare(save_json(tmp_path / "data.json", records), "--images", images)
    assert rejects == set()
    assert sum(map(len, dataset.values())) == 10


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp949"])
def test_csv_of_questions_and_answers_with_columns_to_keep(tmp_path, images, prepare, encoding):
    lines = [
        f'coco/{number:012}.jpg,"몇 명인가요?\n{number}번 사진","{number}명",{number},입구\n' for number in range(1, 21)
    ]
    source = tmp_path / "data.csv"
    source.write_text("image,question,answer,count,zone\n" + "".join(lines), encoding=encoding)
    dataset, _, rejects = prepare(source, "--images", images, "--columns", "count:int64", "zone:string")
    assert rejects == set()
    row = all_rows(dataset)["coco/000000000007.jpg"]
    assert row["messages"] == [
        {"role": "user", "content": "몇 명인가요?\n7번 사진"},
        {"role": "assistant", "content": "7명"},
    ]
    assert (row["count"], row["zone"]) == (7, "입구")


def test_sharegpt_without_images_has_no_column_of_images(tmp_path, prepare):
    records = [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": f"Question {number}?"},
                {"from": "gpt", "value": f"Answer {number}."},
            ]
        }
        for number in range(10)
    ]
    dataset, manifest, rejects = prepare(save_json(tmp_path / "sharegpt.json", records))
    assert rejects == set()
    assert dataset["train"].column_names == ["messages", "image_id"]
    assert manifest["rows"] == {"train": 8, "validation": 1, "test": 1}
    assert [message["role"] for message in dataset["train"]["messages"][0]] == ["system", "user", "assistant"]


def test_several_images_and_none_in_one_dataset(tmp_path, images, prepare):
    records = [llava_record(number) for number in range(1, 11)]
    records[0]["image"] = ["coco/000000000001.jpg", "coco/000000000011.jpg"]
    records[0]["conversations"][0]["value"] = "<image><image>\nWhich one is brighter?"
    del records[1]["image"]
    records[1]["conversations"][0]["value"] = "What is a pixel?"
    dataset, _, rejects = prepare(save_json(tmp_path / "data.json", records), "--images", images)
    assert rejects == set()
    rows = all_rows(dataset)
    assert len(rows["coco/000000000001.jpg"]["images"]) == 2
    assert rows["coco/000000000001.jpg"]["messages"][0]["content"] == "Which one is brighter?"
    (text_only,) = (row for row in rows.values() if not row["images"])
    assert text_only["messages"][0]["content"] == "What is a pixel?"


def test_every_record_that_cannot_be_used_is_in_the_ledger_with_its_reason(tmp_path, images, prepare):
    broken = tmp_path / "images" / "broken.jpg"
    broken.write_bytes((images / "coco" / "000000000001.jpg").read_bytes()[:300])
    draw(images / "large.png", 99, size=(400, 300))
    draw(tmp_path / "secret.jpg", 98)
    answer = {"role": "assistant", "content": "Yes."}
    question = {"role": "user", "content": "Is it?"}

    def llava(image, value="<image>\nIs it?"):
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes."}]
        return {"image": image, "conversations": turns}

    lines = [
        (None, {"messages": [question, answer]}),
        ("duplicate", {"messages": [question, answer]}),
        ("not_json", '{"messages": ['),
        ("not_an_object", ["text"]),
        ("unknown_form", {"prompt": "Is it?", "completion": "Yes."}),
        ("no_turns", {"messages": []}),
        ("bad_turn", {"messages": [{"content": "Is it?"}, answer]}),
        ("unknown_role", {"messages": [{"role": "moderator", "content": "Hush."}, answer]}),
        ("bad_content", {"messages": [{"role": "user", "content": 3}, answer]}),
        ("video_or_audio", {"messages": [{"role": "user", "content": [{"type": "audio"}]}, answer]}),
        ("empty_text", {"messages": [question, {"role": "assistant", "content": "  "}]}),
        ("no_assistant_turn", {"messages": [question]}),
        ("roles_do_not_alternate", {"messages": [question, answer, question]}),
        ("roles_do_not_alternate", {"messages": [answer, question, answer]}),
        ("misplaced_image_mark", {"messages": [question, {"role": "assistant", "content": "<image> Yes."}]}),
        ("image_mark_count", llava("coco/000000000001.jpg", "Is it?")),
        ("image_mark_count", llava(None)),
        ("image_mark_count", llava("coco/000000000001.jpg", "<image><image> Is it?")),
        ("missing_image", llava("coco/404.jpg")),
        ("outside_folder", llava("../secret.jpg")),
        ("outside_folder", llava(str(tmp_path / "secret.jpg"))),
        ("missing_image", llava({"path": "x.jpg"})),
        ("bad_image", llava({"height": 3})),
        ("bad_image", llava(3)),
        ("not_an_image", llava("data:image/jpeg;base64," + "A" * 5000)),
        ("bad_name", llava("a\0.jpg")),
        ("bad_content", {"messages": [{"role": "user", "content": "half a pair \ud83d"}, answer]}),
        ("corrupt_image", llava("broken.jpg")),
        ("oversized_image", llava("large.png")),
        (None, llava("coco/000000000001.jpg")),
        ("duplicate", llava("coco/../coco/000000000001.jpg")),
        (None, llava("coco/000000000002.jpg")),
    ]
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for _, line in lines))
    dataset, manifest, rejects = prepare(source, "--images", images, "--max_pixels", "100000")
    assert rejects == {("data.jsonl", str(number), reason) for number, (reason, _) in enumerate(lines, 1) if reason}
    assert manifest["read"] == {"records": {"read": 32, "accepted": 3, "rejected": 29}}
    assert sum(map(len, dataset.values())) == 3


def test_values_that_a_kept_column_cannot_hold_are_rejected(tmp_path, prepare):
    counts = ["1", "2.0", "2.5", "", "many", "3", "4", "5"]
    source = tmp_path / "data.csv"
    source.write_text("question,answer,count\n" + "".join(f"Q{n}?,A.,{count}\n" for n, count in enumerate(counts)))
    dataset, _, rejects = prepare(source, "--columns", "count:int64")
    assert rejects == {("data.csv", line, "bad_value") for line in ("4", "5", "6")}
    assert sorted(count for rows in dataset.values() for count in rows["count"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("group_by", ["folder", "camera"])
def test_records_of_one_folder_or_camera_stay_together(tmp_path, prepare, group_by):
    records = []
    for number in range(20):
        name = f"c{number % 4}/{number}.jpg"
        draw(tmp_path / "images" / name, number)
        records.append(llava_record(1) | {"image": name, "camera": f"c{number % 4}"})
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    records.append({"messages": turns})
    path = save_json(tmp_path / "r.json", records)
    words = (
        "--images",
        tmp_path / "images",
        "--group_by",
        group_by,
        "--validation_size",
        "0.25",
        "--test_size",
        "0.25",
    )
    dataset, manifest, rejects = prepare(path, *words)
    cameras = {name: {image_id[:2] for image_id in rows["image_id"]} for name, rows in dataset.items()}
    assert sorted(map(len, cameras.values())) == [1, 1, 2]
    assert not set.intersection(*cameras.values())
    assert [reason for _, _, reason in rejects] == ["no_group"]
    assert f"or the same {group_by}" in manifest["split_rule"]


def test_records_of_one_image_or_of_near_duplicates_stay_together(tmp_path, images, prepare):
    records = [llava_record(number) for number in range(1, 21)]
    for number in range(1, 11):  # a second question to each of the first ten images
        second = llava_record(number)
        second["conversations"][0]["value"] = "<image>\nAnything else?"
        records.append(second)
    for number in range(11, 21):  # the others again, a little brighter and encoded anew
        original = Image.open(images / "coco" / f"{number:012}.jpg")
        original.point(lambda value: min(255, value + 4)).save(images / "coco" / f"{100 + number:012}.jpg", quality=70)
        records.append(llava_record(100 + number))
    dataset, manifest, rejects = prepare(save_json(tmp_path / "data.json", records), "--images", images)
    assert rejects == set()
    splits_of = {}
    for name, rows in dataset.items():
        for image_id in rows["image_id"]:
            splits_of.setdefault(int(image_id[5:17]) % 100, set()).add(name)
    assert len(splits_of) == 20
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert manifest["rows"] == {"train": 32, "validation": 4, "test": 4}
    assert [found["near_duplicate_pairs"] for found in manifest["leak_report"]["between"].values()] == [0, 0, 0]


def test_groups_too_large_to_split_are_an_error_that_says_so(tmp_path, images, prepare):
    records = [llava_record(1) for _ in range(10)]
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = f"Answer {number}."
    with pytest.raises(
        ValueError, match=r"10 rows form 1 groups, the largest of 10.*validation and test would be empty"
    ):
        prepare(save_json(tmp_path / "data.json", records), "--images", images)


def test_too_few_records_say_why_the_others_were_rejected(tmp_path, images, prepare):
    videos = [{"video": f"{number}.mp4", **llava_record(1)} for number in range(3)]
    with pytest.raises(ValueError, match=r"(?s)train and validation would be empty.*video_or_audio x 3"):
        prepare(save_json(tmp_path / "data.json", [llava_record(1), *videos]), "--images", images)


def test_no_record_accepted_leaves_nothing_and_says_why(tmp_path, prepare):
    source = save_json(tmp_path / "data.json", [llava_record(1)])
    with pytest.raises(
        ValueError, match=r"(?s)no row was accepted.*no_images_folder x 1.*no --images folder was given"
    ):
        prepare(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json"]


@pytest.mark.slow
def test_mistakes_are_told_without_a_stack_trace(tmp_path):
    result = run_command(
        *("data_prep/prepare_conversations.py", "--input", tmp_path / "none.json", "--output", tmp_path / "out"),
        *("--images", tmp_path / "nowhere", "--columns", "count:integer", "--test_size", "1"),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"prepare_conversations.py: --images {tmp_path / 'nowhere'} is not a folder",
        "--validation_size 0.1 and --test_size 1.0: expected shares that leave some to train",
        "--columns count:integer: expected a column's name and one of string, int64, float64: count:int64",
    ]


def test_an_input_that_is_not_there_is_named(tmp_path, prepare):
    for missing in (tmp_path / "none.json", Path("data/none.json"), tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=rf"--input {missing} is no file of \.json \.jsonl \.csv \.tsv, no folder, and no Hub name"
        ):
            prepare(missing)


@pytest.mark.parametrize(
    ("name", "separator", "encoding"),
    [("a.CSV", ",", "utf-8"), ("a.csv", ";", "utf-8-sig"), ("a.tsv", "\t", "utf-8"), ("a.csv", "\t", "cp949")],
)
def test_tables_of_other_programs_and_long_cells(tmp_path, images, prepare, name, separator, encoding):
    long = "말" * 70_000  # more than 128 KiB
    rows = [("image_path", "Question", "Answer")] + [
        (f"coco\\{n:012}.jpg", f"몇 명{n}?", f"{n}명") for n in range(1, 6)
    ]
    text = "\r\n".join(separator.join(row) for row in [*rows, ("", long, "긴 글")])
    (tmp_path / name).write_bytes(text.encode(encoding))
    dataset, manifest, rejects = prepare(
        tmp_path / name, "--images", images, "--validation_size", "0", "--test_size", "0"
    )
    assert rejects == set()
    shown = {row["messages"][0]["content"]: len(row["images"]) for row in dataset["train"]}
    assert shown == {f"몇 명{n}?": 1 for n in range(1, 6)} | {long: 0}
    assert manifest["unused_keys"] == {}


def test_keys_that_are_not_used_are_counted(tmp_path, images, prepare, capsys):
    records = [llava_record(number) | {"source": "coco"} for number in range(1, 4)] + [llava_record(4)]
    _, manifest, _ = prepare(
        save_json(tmp_path / "data.json", records), "--images", images, "--validation_size", "0", "--test_size", "0"
    )
    assert manifest["unused_keys"] == {"id": 4, "source": 3}
    assert "keys not used: id x 4, source x 3" in capsys.readouterr().out


def test_records_of_one_line_are_told_apart_and_masks_become_weights(tmp_path, prepare):
    records = [
        {"messages": [{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": "A."}]} for n in (1, 2)
    ]
    turns = [*records[0]["messages"], *records[1]["messages"]]
    records += [{"messages": [turns[0], turns[1] | {"weight": 0}, *turns[2:]]}, {"messages": []}, {"messages": []}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    dataset, _, rejects = prepare(tmp_path / "data.json", "--validation_size", "0", "--test_size", "0")
    assert rejects == {("data.json", "1", "no_turns")}
    assert (tmp_path / "out" / "rejects.csv").read_text("utf-8-sig").count("record 4: ") == 1
    rows = {row["image_id"]: [message["weight"] for message in row["messages"]] for row in dataset["train"]}
    assert rows == {"text-1": [1, 1], "text-2": [1, 1], "text-3": [1, 0, 1, 1]}


def test_columns_of_pictures_video_and_sound_of_a_dataset(tmp_path, images, prepare):
    row = {"messages": as_messages(1)["messages"]}
    row["messages"][0] = {"role": "user", "content": "What is it?"}

    def save(name: str, **columns) -> Path:
        rows = [row | {"id": n} for n in range(2)]
        saved = datasets.Dataset.from_list(rows)
        for column, (feature, value) in columns.items():
            saved = saved.add_column(column, [value] * 2).cast_column(column, feature)
        datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / name)
        return tmp_path / name

    picture = (datasets.Image(), str(images / "coco" / "000000000001.jpg"))
    dataset, _, _ = prepare(save("one", photo=picture), "--validation_size", "0", "--test_size", "0")
    assert len(dataset["train"][0]["images"]) == 1
    with pytest.raises(ValueError, match="holds images in image, depth: leave the column that is meant"):
        prepare(save("two", image=picture, depth=picture), output="out2")
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="holds video or audio in sound"):
        prepare(save("sound", sound=(datasets.Audio(decode=False), str(tmp_path / "a.wav"))), output="out3")


def test_tasks_and_several_right_answers_are_carried(tmp_path, images, prepare):
    records = [
        {
            "image": f"coco/{number:012}.jpg",
            "question": "What is it?",
            "answers": [{"answer": "noise", "answer_id": 1}, {"answer": "a picture"}, {"answer": "noise"}],
            "kind": "short_answer",
        }
        for number in range(1, 9)
    ]
    records.append(records[0] | {"image": "coco/000000000009.jpg", "kind": "shouting"})
    records.append(records[0] | {"image": "coco/000000000010.jpg", "answer": "noise", "answers": [3]})
    source = save_json(tmp_path / "vqa.json", records)
    dataset, _, rejects = prepare(source, "--images", images, "--task", "kind", "--answers", "answers")
    row = all_rows(dataset)["coco/000000000003.jpg"]
    assert (row["task"], row["answers"]) == ("short_answer", ["noise", "a picture", "noise"])
    assert row["messages"][-1] == {"role": "assistant", "content": "noise"}  # the commonest is what is taught
    assert {reason for _, _, reason in rejects} == {"bad_task", "bad_answers"}
    dataset, _, _ = prepare(source, "--images", images, "--task", "yes_no", "--answers", "answers", output="all")
    assert set(dataset["train"]["task"]) == {"yes_no"}


def test_a_name_in_other_capitals_is_told_the_right_one(tmp_path):
    draw(tmp_path / "photos" / "Cat.JPG", 1)
    reason, detail = find_inside("photos/cat.jpg", tmp_path)
    assert reason == "missing_image" and detail.endswith(", but 'Cat.JPG' is: write the name in its own capitals")
    assert find_inside("photos/Cat.JPG", tmp_path) == tmp_path / "photos" / "Cat.JPG"
