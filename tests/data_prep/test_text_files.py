"""Files that are larger than what is read of them at once: the same items, on the same lines, or the same mistake."""

import json

import pytest

from preparing import text_files
from preparing.text_files import json_items, open_text

ITEMS = [{"id": 7, "text": "줄\n바꿈"}, {"id": 12, "turns": [{"value": "a, b ] c"}] * 9}, 123456, "x" * 50, [], None]


@pytest.fixture(params=[1, 2, 5, 1 << 16])
def read_at_once(request, monkeypatch) -> int:
    monkeypatch.setattr(text_files, "READ_AT_ONCE", request.param)
    return request.param


def items_of(path):
    with open_text(path) as file:
        return list(json_items(path, file))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_items_of_a_list_come_with_the_lines_they_start_on(read_at_once, line_end, tmp_path):
    path, text, lines = tmp_path / "list.json", "[\n", []
    for item in ITEMS:
        lines.append(text.count("\n") + 1)
        text += json.dumps(item, ensure_ascii=False, indent=1) + ("" if item is None else " ,\n")
    path.write_bytes((text + "\n]\n").replace("\n", line_end).encode())
    assert items_of(path) == list(zip(lines, ITEMS, strict=True))


def test_one_object_and_json_lines_are_lists_too(read_at_once, tmp_path):
    path = tmp_path / "any.json"
    path.write_text("\n" + json.dumps(ITEMS[1], indent=2))
    assert items_of(path) == [(2, ITEMS[1])]
    path.write_text("12\n\n345\n 6")
    assert items_of(path) == [(1, 12), (3, 345), (4, 6)]
    path.write_text("")
    assert items_of(path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a": }]', r"any\.json:3 is not JSON: Expecting value"),
        ('[{"a": 1},\n\n{"a": 2', r"any\.json:3 is not JSON"),
        ('[{"a": 1},\n{"a": 2}', "the list that opens it does not close"),
        ("[12", "the list that opens it does not close"),
        ("[1]\n2", "the list that opens it does not close at the end of the file"),
    ],
)
def test_the_line_of_a_mistake_is_named(read_at_once, text, problem, tmp_path):
    (tmp_path / "any.json").write_text(text)
    with pytest.raises(ValueError, match=problem):
        items_of(tmp_path / "any.json")


def test_an_encoding_is_found_however_the_file_is_cut(read_at_once, tmp_path):
    path = tmp_path / "any.txt"
    for encoding in ("utf-8", "utf-8-sig", "cp949"):
        path.write_text("첫 줄\n둘째 줄", encoding=encoding)
        with open_text(path) as file:
            assert file.read() == "첫 줄\n둘째 줄"
    path.write_bytes(b"a\nb\n\xff\xff\n")
    with pytest.raises(ValueError, match=r"neither UTF-8 nor CP949 \(line 3\)"):
        open_text(path)
