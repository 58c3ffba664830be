"""Any valid dataset: each accepted row, read back, is the row that was written down, and every record is accounted for."""

import csv
import json
import sys
import tempfile
import unicodedata
from pathlib import Path

import prepare_conversations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.data.collator import IMAGE_LINE
from finetuning.data.pictures import open_picture
from support.raw_data import draw, read_output

NUM_PICTURES = 6
# Marks have tests of their own; here text is anything else that a dataset can hold.
WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<[{"), min_size=1, max_size=40
).filter(lambda text: unicodedata.normalize("NFC", text).strip())
LINES = st.lists(WORDS, min_size=1, max_size=3).map("\n".join)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    for number in range(NUM_PICTURES):
        draw(folder / f"사진 {number}" / f"{number}.{'png' if number % 2 else 'jpg'}", number)
    return folder


def name_of(number: int) -> str:
    return f"사진 {number}/{number}.{'png' if number % 2 else 'jpg'}"


@st.composite
def dialogues(draw_from):
    """A dialogue as a person means it: (system or None, [(pictures, question, answer, learnt)])."""
    exchanges = draw_from(
        st.lists(
            st.tuples(st.lists(st.integers(0, NUM_PICTURES - 1), max_size=2), LINES, LINES, st.booleans()),
            min_size=1,
            max_size=3,
        )
    )
    if not any(learnt for *_, learnt in exchanges):
        exchanges = [(*rest, True) for *rest, _ in exchanges]
    return draw_from(st.none() | LINES), exchanges


def clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def as_row(dialogue) -> tuple[list[tuple[str, str, int]], list[str]]:
    """What training must read: (role, text, weight) of each turn, names of the pictures."""
    system, exchanges = dialogue
    turns = [("system", clean(system), 1)] if system else []
    later = any(pictures for pictures, *_ in exchanges[1:])
    for pictures, question, answer, learnt in exchanges:
        turns.append(("user", (IMAGE_LINE * len(pictures) if later else "") + clean(question), 1))
        turns.append(("assistant", clean(answer), int(learnt)))
    return turns, [name_of(number) for pictures, *_ in exchanges for number in pictures]


def as_llava(dialogue, number: int, choose) -> dict:
    system, exchanges = dialogue
    turns = [{"from": "system", "value": system}] if system else []
    for pictures, question, answer, learnt in exchanges:
        turns.append({"from": "human", "value": "".join(["<image>\n"] * len(pictures)) + question})
        turns.append({"from": "gpt", "value": answer, **({} if learnt else {"loss": False})})
    names = [name_of(picture) for pictures, *_ in exchanges for picture in pictures]
    key = choose(["image", "images", "image_path"])
    return {"id": str(number), "conversations": turns, **({key: names} if names else {})}


def as_messages(dialogue, number: int, choose) -> dict:
    system, exchanges = dialogue
    messages, mask, by_name = [], [], choose([True, False])
    for pictures, question, answer, learnt in exchanges:
        parts = [{"type": "image", "image": name_of(picture)} if by_name else {"type": "image"} for picture in pictures]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
        mask += [0, int(learnt)]
    record = {"id": str(number), "messages": messages, "loss_mask": mask}
    names = [name_of(picture) for pictures, *_ in exchanges for picture in pictures]
    return record | ({"images": names} if names and not by_name else {}) | ({"system": system} if system else {})


@st.composite
def written_datasets(draw_from):
    """(dialogues as they are meant, suffix of the file, its text)."""
    meant = draw_from(st.lists(dialogues(), min_size=1, max_size=5))

    def choose(options):
        return draw_from(st.sampled_from(options))

    records = [choose([as_llava, as_messages])(dialogue, number, choose) for number, dialogue in enumerate(meant)]
    suffix = choose([".json", ".jsonl", ".JSON"])
    if suffix == ".jsonl":
        return meant, suffix, "\n".join(json.dumps(record) for record in records)
    return meant, suffix, json.dumps(records, ensure_ascii=choose([True, False]), indent=choose([None, 1]))


def prepared(source: Path, images: Path) -> tuple[dict[str, dict], dict]:
    """(rows by their id, what the manifest counts) of the whole command, run in this process."""
    output = source.with_name("out")
    words = ["--input", source, "--images", images, "--output", output, "--columns", "id:string"]
    words += ["--validation_size", "0", "--test_size", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_conversations.py", *map(str, words)])
        prepare_conversations.main()
    dataset, manifest, rejects = read_output(output)
    assert {reason for *_, reason in rejects} <= {"duplicate"}
    return {row["id"]: row for rows in dataset.values() for row in rows}, manifest["read"]["records"]


def check(meant: list, rows: dict[str, dict], counts: dict, images: Path) -> None:
    assert counts["read"] == len(meant)
    assert counts["accepted"] == len(rows)
    wanted = {str(number): as_row(dialogue) for number, dialogue in enumerate(meant)}
    for number, row in rows.items():
        turns, names = wanted[number]
        assert [(m["role"], m["content"], m.get("weight", 1)) for m in row["messages"]] == turns
        shown = [open_picture(image).tobytes() for image in row.get("images", [])]
        assert shown == [open_picture(images / name).tobytes() for name in names]
    accepted = [wanted[number] for number in rows]
    assert all(wanted[number] in accepted for number in wanted.keys() - rows.keys())


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False}


@settings(max_examples=20, derandomize=True, **COMMON)
@given(written_datasets())
@pytest.mark.slow
def test_what_is_accepted_is_what_was_written(images, written):
    meant, suffix, text = written
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"data{suffix}"
        source.write_text(text, encoding="utf-8")
        check(meant, *prepared(source, images), images)


CELLS = st.tuples(st.none() | st.integers(0, NUM_PICTURES - 1), WORDS, LINES)


@settings(max_examples=8, derandomize=True, **COMMON)
@given(
    st.lists(CELLS, min_size=1, max_size=6), st.sampled_from(["utf-8", "utf-8-sig"]), st.sampled_from([".csv", ".CSV"])
)
@pytest.mark.slow
def test_what_is_accepted_of_a_table_is_what_was_written(images, cells, encoding, suffix):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"data{suffix}"
        with source.open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "file_name", "question", "answer"])
            for number, (picture, question, answer) in enumerate(cells):
                writer.writerow([number, "" if picture is None else name_of(picture), question, answer])
        meant = [
            (None, [([] if picture is None else [picture], question, answer, True)])
            for picture, question, answer in cells
        ]
        check(meant, *prepared(source, images), images)
