"""Question templates: reads messages.txt in either form, checks every placeholder, fills in the columns of the labels."""

import io
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preparing.conversations import Turns, read_turns
from preparing.frame_names import Found, FrameIndex
from preparing.record_keys import name_pictures, obey_other_keys, read_conversation_of, say_problem
from preparing.records import Dialogue, Label
from preparing.text_files import json_items, read_text

# The text form's own names of speakers, and others that people know from chat logs and other tools.
OWN_SPEAKERS = {
    "user": "user", "assistant": "assistant", "system": "system",
    "사용자": "user", "어시스턴트": "assistant", "시스템": "system",
}  # fmt: skip
OTHER_SPEAKERS = {
    "human": "user", "q": "user", "question": "user", "prompt": "user", "instruction": "user", "질문": "user", "문": "user",
    "ai": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "a": "assistant", "answer": "assistant", "response": "assistant", "completion": "assistant", "output": "assistant",
    "답변": "assistant", "답": "assistant", "응답": "assistant", "대답": "assistant", "챗봇": "assistant", "봇": "assistant",
}  # fmt: skip
SHOWN_JSON = re.compile(r"\{\s*[\"'][^\"'{}]+[\"']\s*:")
IMAGE_LINES = ("image", "이미지")
_speakers = "|".join(sorted([*OWN_SPEAKERS, *OTHER_SPEAKERS, *IMAGE_LINES], key=len, reverse=True))
# USER: ..., **USER:** ..., **User**: ..., ### Human: ...
TURN = re.compile(
    rf"^\s*(?P<mark>[-*_#>\s]*)(?P<speaker>{_speakers})\s*[*_]*\s*[:：]\s*(?:(?<=[:：])[*_]+)?\s*(?P<text>.*)$",
    re.IGNORECASE,
)
RULE = re.compile(r"^\s*([-*=_~#])(\s*\1){2,}\s*$")  # a line between two dialogues: ---, ***, = = =
EXPECTED = "expected lines that begin with USER: or ASSISTANT: (사용자:, 어시스턴트:)"

# Words that stand for a number in placeholders of other tools: <count>, [number], %d.
NUMBER_WORDS = (
    "count", "number", "num", "n", "x", "xx", "total", "value", "int", "integer", "answer", "people", "수", "인원", "인원수",
    "사람수", "사람 수", "숫자", "개수",
)  # fmt: skip
BLANK = re.compile(
    r"_{2,}|(?<![\w'])[NX](?=\s?(?:people|persons?|명)\b)|\b[xX]{2,}\b|[○◯□]{2,}|(?<!\w)%\(?[a-z_]*\)?[ds](?!\w)"
)


# An answer that is nothing but such a word or mark, or holds it between marks, states no number.
_placeholders = "|".join(sorted(map(re.escape, NUMBER_WORDS), key=len, reverse=True))
UNFILLED_ANSWER = re.compile(
    rf"^\W*(?:(?:there (?:are|is)|i see|i count|answer|total)\b\W*)?(?:(?:count|number|num|total|value|수|인원|인원수|숫자)|0{{2,}}|[#*?.…_~]{{2,}}|#)"
    r"(?:\s*(?:people|persons?|heads?|명))?\W*$"
    rf"|\(\s*(?:{_placeholders})\s*\)|#(?:{_placeholders})#|@(?:{_placeholders})\b|[｛［＜]\s*(?:{_placeholders})\s*[｝］＞]"
    rf"|[\"'](?:{_placeholders})[\"']\s*:\s*[\"']?(?:[NX]|int(?:eger)?|number|\?+|_+|\.{{3}}|#+)[\"']?\s*[,}}]"
    rf"|<%=?\s*(?:{_placeholders})\s*%>|(?<![#*\w])#{{2,}}\s*(?:people|persons?|명)",
    re.IGNORECASE,
)


def read_dialogues(path: Path) -> tuple[list[Dialogue], list[str]]:
    """(the dialogues of messages.txt in either form, each with its first problem, if any; keys that are not used)."""
    text = read_text(path)
    dialogues: list[Dialogue] = []
    unused: Counter[str] = Counter()
    in_json = text.lstrip().startswith("{") or re.match(r"\s*\[\s*[{\]\[]", text)
    for line, turns, images, keys in read_json(path, text) if in_json else read_plain(text):
        unused.update([*keys, *turns.unused])
        image = images[0] if len(images) == 1 and isinstance(images[0], str) else None
        dialogue = Dialogue(str(path), line, messages=turns.messages, image=image)
        if images and image is None:
            shown = images[0] if len(images) == 1 else images
            dialogue.reject("bad_image", f"image is {shown!r:.80}, expected the name of one frame")
        elif turns.problems:
            dialogue.reject(turns.problems[0][0], "; ".join(detail for _, detail in turns.problems))
        elif any("weight" in message for message in turns.messages):
            dialogue.reject("masked_turn", "one of its answers is not to be learnt, which is not done here")
        elif turns.num_image_marks > 1:
            dialogue.reject("image_mark_count", f"{turns.num_image_marks} image marks, but each row has one frame")
        dialogues.append(dialogue)
    return dialogues, [f"key {key!r} of {number:,} dialogues is not used" for key, number in unused.items()]


def read_json(path: Path, text: str) -> Iterator[tuple[int, Turns, list[Any], list[str]]]:
    """(line, turns, images, keys not used) of each conversation: a list of messages, or an object that holds one."""
    items = list(json_items(path, io.StringIO(text)))
    if items and all(isinstance(item, dict) and ("role" in item or "from" in item) for _, item in items):
        items = [(items[0][0], [item for _, item in items])]
    for line, item in items:
        if not isinstance(item, dict):
            yield line, read_turns(item), [], []
            continue
        try:
            turns, _, used = read_conversation_of(item)
            if turns is None:
                keys = ", ".join(map(str, item))
                raise ValueError("unknown_form", f"expected messages, or question and answer; got the keys {keys:.120}")
            # A picture that the text names is the frame, as a key would name it.
            images: list[Any] = name_pictures(item, used) or [name for name in turns.pictures if name is not None]
            if not turns.problems:
                obey_other_keys(item, turns.messages, used, ())
        except ValueError as error:
            yield line, Turns([], 0, [say_problem(error)]), [], []
            continue
        yield line, turns, images, [str(key) for key in item if key not in used and key != "id"]


def read_plain(text: str) -> Iterator[tuple[int, Turns, list[Any], list[str]]]:
    """(line, turns, images, no keys) of each block between blank lines or rules.

    A line that opens no turn continues the last. Who speaks is told by the names that open a block: USER and ASSISTANT, or
    those of other tools. A block that mixes the two is refused, because a name that is not known is taught as a word.
    """
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip() and not RULE.match(line):
            blocks[-1].append((number, line))
        elif blocks[-1]:
            blocks.append([])
    for block in filter(None, blocks):
        turns: list[dict[str, str]] = []
        images = []
        problem = ""
        own = None  # whether the block names its speakers as the text form does
        for number, line in block:
            turn = TURN.match(line)
            speaker = turn["speaker"].lower() if turn else ""
            if speaker in IMAGE_LINES:
                images.append(turn["text"].strip())
            elif not turn and not turns:
                problem = problem or f"line {number} is {line.strip()!r:.80} and opens no turn, {EXPECTED}"
            elif not turn:
                turns[-1]["content"] += "\n" + line.strip()
            elif own is True and speaker not in OWN_SPEAKERS:
                problem = problem or (
                    f"line {number} begins with {turn['speaker']}: in a dialogue of USER: and ASSISTANT:, so that it could be "
                    f"a turn or a part of the one before; {EXPECTED}, or words that do not begin so"
                )
            else:
                own = speaker in OWN_SPEAKERS and own is not False and not turn["mark"].strip()
                role = OWN_SPEAKERS.get(speaker) or OTHER_SPEAKERS[speaker]
                content = turn["text"].strip()
                if (mark := turn["mark"].strip()) and content.count(mark) % 2:
                    content = content.removesuffix(mark)  # **USER: ...**
                turns.append({"role": role, "content": content})
        yield block[0][0], Turns([], 0, [("bad_turn", problem)]) if problem else read_turns(turns), images, []


def check_templates(dialogues: list[Dialogue], columns: list[str], count_names: set[str]) -> None:
    """Every brace must be a column of the labels; all that is wrong with a dialogue goes into one detail.

    Braces of a JSON answer are text: {"count": {count}} is filled in as {"count": 7}.
    """
    first_lines: dict[tuple[Any, ...], int | None] = {}
    for dialogue in dialogues:
        if dialogue.problem:
            continue
        problems = []
        for message in dialogue.messages:
            asked = message["role"] != "assistant"
            names, of_message = check_template(message["content"], columns, asked=asked)
            escaped = escape_json(message["content"], columns, like_json=asked)
            if of_message and escaped != message["content"]:
                message["content"] = escaped
                names, of_message = check_template(escaped, columns, asked=asked)
            problems += of_message
            if not asked and not names and (unfilled := UNFILLED_ANSWER.search(message["content"])):
                problems.append(
                    f"the answer {unfilled[0].strip()!r:.40} states no number: write {{count}} to fill it in"
                )
            # The count by whichever name: a column `people` that counts is the count.
            dialogue.fields.append(names | {"count"} if names & count_names else names)
        if problems:
            dialogue.reject("bad_template", "; ".join(dict.fromkeys(problems)))
            continue
        content = (dialogue.image, *((message["role"], message["content"]) for message in dialogue.messages))
        if content in first_lines:
            dialogue.reject("duplicate_dialogue", f"it says the same as line {first_lines[content]}")
        first_lines.setdefault(content, dialogue.line)


def check_template(template: str, columns: list[str], *, asked: bool = False) -> tuple[set[str], list[str]]:
    """(columns that the template fills in, what is wrong with it); `asked`: a question may show the form of its answer."""
    names: set[str] = set()
    problems = []
    text = ""  # without what is filled in
    try:
        for literal, name, format_spec, conversion in string.Formatter().parse(template):
            text += literal
            if name is None:
                continue
            text += "\0"
            if literal.endswith(("$", "%")) and not literal[-2:-1].isalnum():
                problems.append(f"{literal[-1]}{{{name}}} would keep its {literal[-1]}: write {{{name}}}")
            names.add(name)
            if name not in columns or format_spec or conversion:
                written = (
                    f"{{{name}{'!' + conversion if conversion else ''}{':' + format_spec if format_spec else ''}}}"
                )
                twice = " (a brace that is meant is written twice)" if re.search("[\"'\\\\]", written) else ""
                problems.append(f"{written} is no column in braces, expected one of {', '.join(columns)}{twice}")
    except ValueError as error:
        return set(), [f"{template!r:.60}: {error} (a brace that is meant is written twice)"]
    if re.search(r"(?<![\w}])\{\0\}", text):
        problems.append("{{{...}}} would keep one pair of braces: write {count}, or another column in braces")
    text = re.sub(r"\{\s*[\"'][^{}]*\}", "", text) if asked else text
    known = {name.casefold() for name in columns}
    for word in re.findall(r"\{\s*([^{}]*?)\s*\}", text):
        if word.casefold() in known:
            problems.append(f"{{{{{word}}}}} would be taught as the words {{{word}}}: write {{{word}}} to fill it in")
    words = "|".join(re.escape(word) for word in sorted({*known, *NUMBER_WORDS}, key=len, reverse=True))
    unfilled = re.findall(
        rf"<\s*(?:{words})\s*>|\[\s*(?:{words})\s*\]|\$(?:{words})\b|%(?:{words})%|«(?:{words})»", text, re.IGNORECASE
    )
    unfilled += BLANK.findall(text)
    problems += [f"{written} is not filled in: write {{count}}, or another column in braces" for written in unfilled]
    return names, problems


def escape_json(template: str, columns: Iterable[str], *, like_json: bool = False) -> str:
    """The template with doubled braces around JSON, in which {columns} stand for numbers or inside quotes.

    `like_json`: also around what only looks so, as a question shows the form of its answer: {"count": N}, {"count": <int>}.
    """
    placeholder = re.compile("|".join(re.escape(f"{{{name}}}") for name in columns))
    written = ""
    position = 0
    while position < len(template):
        if match := placeholder.match(template, position):
            written += match[0]
            position = match.end()
            continue
        end = closing_brace(template, position) if template[position] == "{" else 0
        region = template[position:end]
        if ('"' in region and is_json(placeholder.sub("0", region))) or (like_json and SHOWN_JSON.match(region)):
            literals = placeholder.split(region)
            filled = [*placeholder.findall(region), ""]
            for literal, name in zip(literals, filled, strict=True):
                written += literal.replace("{", "{{").replace("}", "}}") + name
            position = end
        else:
            written += template[position]
            position += 1
    return written


def closing_brace(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`; 0 when none does."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return 0


def is_json(text: str) -> bool:
    """Whether the text as a whole is JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def fill_in(template: str, values: dict[str, str]) -> str:
    """Like str.format, but a column may be called `a.b` or `7`, and nothing but columns is ever looked up.

    In NFC: Hangul as macOS writes it (NFD) would be three times as many tokens.
    """
    parts = string.Formatter().parse(template)
    text = "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)
    return unicodedata.normalize("NFC", text)


def tie_dialogues(dialogues: list[Dialogue], index: FrameIndex) -> None:
    """Find the frame that each dialogue names; one that names none, or could mean two, is rejected."""
    for dialogue in dialogues:
        if dialogue.problem or dialogue.image is None:
            continue
        found = index.find(dialogue.image)
        if not isinstance(found, Found):
            dialogue.reject(*found)
        elif found.by == "number" and index.number_offset:
            detail = f"{dialogue.image!r} could be meant before or after --number_offset: write the file name"
            dialogue.reject("ambiguous_frame", detail)
        else:
            dialogue.frame = found.frame


def check_empty_cells(dialogues: list[Dialogue], labels: list[Label]) -> None:
    """A template cannot fill in an empty cell: without its value a label is no use to a dialogue for any frame."""
    for_any = [dialogue for dialogue in dialogues if not dialogue.problem and not dialogue.frame]
    needed = set().union(*(names for dialogue in for_any for names in dialogue.fields))
    for label in labels:
        if label.problem or not (empty := sorted(name for name in needed if not label.values[name])):
            continue
        if unlike := [name for name in empty if name in label.differing]:
            label.reject(
                "empty_cell", f"{', '.join(unlike)} differs between the rows of one frame, but messages.txt uses it"
            )
        else:
            label.reject("empty_cell", f"{', '.join(empty)} is empty, but messages.txt uses it")
