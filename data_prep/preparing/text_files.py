"""Reads text files that people made: UTF-8 or CP949, with the line on which every item starts."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """The file's text from UTF-8 (with or without BOM), else CP949 as Korean Excel saves it. ValueError names the file."""
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} holds NUL bytes, as UTF-16 text does: save it as UTF-8")
    for encoding in ("utf-8-sig", "cp949"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path} is neither UTF-8 nor CP949 (line {line}): save it as UTF-8")


def normalise_name(name: str) -> str:
    """A file name for comparing: NFC (macOS writes NFD), forward slashes, case folded, no surrounding space."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/").casefold()


class RepeatedKeys(dict):
    """A JSON object in which, or inside which, a key stands twice; the last value of each is held, as usual."""

    names: list[str]


def keep_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: a dict, or RepeatedKeys, so that nobody takes one of two values in silence."""
    held = dict(pairs)
    names = [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    for value in held.values():
        for inner in value if isinstance(value, list) else (value,):
            names += inner.names if isinstance(inner, RepeatedKeys) else []
    if not names:
        return held
    repeated = RepeatedKeys(held)
    repeated.names = names
    return repeated


def json_items(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line on which the item starts, item) of a JSON list, of JSON lines, or of one JSON object (a list of one).

    Raises ValueError with file and line where the text stops being JSON.
    """
    decoder = json.JSONDecoder(object_pairs_hook=keep_repeated)
    position = line_position = 0
    line = 1

    def skip(characters: str) -> None:
        nonlocal position
        while position < len(text) and text[position] in characters:
            position += 1

    skip(" \t\r\n")
    in_list = text[position : position + 1] == "["
    if in_list:
        position += 1
    while True:
        skip(" \t\r\n")
        if position == len(text) or (in_list and text[position] == "]"):
            break
        line += text.count("\n", line_position, position)
        line_position = position
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
        yield line, item
        skip(" \t\r\n")
        if in_list and text[position : position + 1] == ",":
            position += 1
    if in_list and text[position:].strip() != "]":
        raise ValueError(f"{path} is not JSON: the list that opens it does not close at the end of the file")
