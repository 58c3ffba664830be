"""Reads text files that people made: UTF-8 or CP949, with the line on which every item starts."""

import codecs
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

READ_AT_ONCE = 1 << 16


def read_text(path: Path) -> str:
    """The file's text, without BOM. ValueError names the file, as `open_text` does."""
    with open_text(path) as file:
        return file.read()


def open_text(path: Path) -> TextIO:
    """A file as text, line ends as they are: UTF-8 (with or without BOM), else CP949 as Korean Excel saves it.

    It is read once before, to know which: nothing of a file that is neither is used. ValueError names it and the line.
    """
    for encoding in ("utf-8-sig", "cp949"):
        decoder, line = codecs.getincrementaldecoder(encoding)(), 1
        try:
            with path.open("rb") as file:
                while chunk := file.read(READ_AT_ONCE):
                    if b"\0" in chunk:
                        raise ValueError(f"{path} holds NUL bytes, as UTF-16 text does: save it as UTF-8")
                    decoder.decode(chunk)
                    line += chunk.count(b"\n")
                decoder.decode(b"", final=True)
            return path.open(encoding=encoding, newline="\n")
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
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


def json_items(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """(line on which the item starts, item) of a JSON list, of JSON lines, or of one JSON object (a list of one).

    `file` is read as it goes, one item and some more in memory. Raises ValueError with file and line where it stops being
    JSON.
    """
    decoder = json.JSONDecoder(object_pairs_hook=keep_repeated)
    text, position, first_line = "", 0, 1

    def read_on() -> bool:
        nonlocal text, position, first_line
        more = file.read(max(READ_AT_ONCE, len(text) - position))  # of a long item twice as much each time
        if more:
            first_line += text.count("\n", 0, position)
            text, position = text[position:] + more, 0
        return bool(more)

    def skip(characters: str) -> str:
        """The next character that is not one of these, "" at the end."""
        nonlocal position
        while True:
            while position < len(text) and text[position] in characters:
                position += 1
            if position < len(text) or not read_on():
                return text[position : position + 1]

    in_list = skip(" \t\r\n") == "["
    position += in_list
    while (sign := skip(" \t\r\n")) and not (in_list and sign == "]"):
        while True:
            try:
                item, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if not read_on():
                    line = first_line + error.lineno - 1
                    raise ValueError(f"{path}:{line} is not JSON: {error.msg}") from error
                continue
            if end < len(text) or not read_on():  # a number may go on
                break
        line, position = first_line + text.count("\n", 0, position), end
        yield line, item
        if skip(" \t\r\n") == "," and in_list:
            position += 1
    if in_list and (text[position:] + file.read()).strip() != "]":
        raise ValueError(f"{path} is not JSON: the list that opens it does not close at the end of the file")
