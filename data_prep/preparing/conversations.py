"""Conversations in the forms that people keep them, turned into one: a list of {"role", "content": str}."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_MARK = "<image>"

# Column names that training or TRL reads; another meaning under one of them would change what is trained.
RESERVED_COLUMNS = ("messages", "images", "image", "image_id", "row", "conversations", "prompt", "completion", "text")

MESSAGES_FEATURE = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
IMAGES_FEATURE = datasets.List(datasets.Image())


class Turns(NamedTuple):
    """One conversation, checked. `messages` is meant for use only when `problems` is empty."""

    messages: list[dict[str, str]]
    num_image_marks: int
    problems: list[tuple[str, str]]  # (reason, detail) as the ledger wants them


def read_content(content: Any) -> tuple[str, int]:
    """(text without image marks, number of image marks) of a message's content.

    Content is text, or a list of typed parts: `{"type": "text", "text": ...}`, `{"type": "image", ...}`, with or
    without the `index` that the vsft datasets add. Raises ValueError for anything else.
    """
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
    else:
        raise ValueError(f"content is {type(content).__name__}, expected text or a list of typed parts")
    texts, num_marks = [], 0
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise ValueError(f"a content part is {part!r:.80}, expected one of type text or image")
        if part["type"] == "image":
            num_marks += 1
            continue
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a text part holds {part.get('text')!r:.80}, expected a string")
        num_marks += part["text"].count(IMAGE_MARK)
        texts.append(re.sub(rf"[ \t]*{IMAGE_MARK}[ \t]*\n?", " ", part["text"]).strip())
    text = "\n".join(filter(None, texts))
    text.encode()  # JSON can hold half a surrogate pair, which no dataset can: UnicodeEncodeError is a ValueError
    return text, num_marks


def read_turns(raw: Any, role_key: str = "role", content_key: str = "content") -> Turns:
    """Reads and checks a list of turns. Marks may stand only in the first user turn, where training puts the images.

    LLaVA and ShareGPT call the keys `from` and `value`, and the roles human and gpt.
    """
    if not isinstance(raw, list) or not raw:
        return Turns([], 0, [("no_turns", f"expected a list of turns, got {raw!r:.80}")])
    messages, marks, problems = [], [], []
    for number, turn in enumerate(raw, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            problems.append(("bad_turn", f"turn {number} is {turn!r:.80}, expected the keys {role_key}, {content_key}"))
            continue
        role = ROLES.get(str(turn[role_key]).strip().lower())
        if role is None:
            expected = ", ".join(ROLES)
            problems.append(("unknown_role", f"turn {number} is by {turn[role_key]!r:.40}, expected one of {expected}"))
            continue
        try:
            content, num_marks = read_content(turn[content_key])
        except ValueError as error:
            problems.append(("bad_content", f"turn {number}: {error}"))
            continue
        if not content:
            problems.append(("empty_text", f"turn {number} ({role}) has no text"))
        messages.append({"role": role, "content": content})
        marks.append(num_marks)
    if not problems:
        problems = check_roles([message["role"] for message in messages])
        first_user = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
        for place, num_marks in enumerate(marks):
            if num_marks and place != first_user:
                detail = f"turn {place + 1} holds {IMAGE_MARK}; images belong to the first user turn"
                problems.append(("misplaced_image_mark", detail))
    return Turns(messages, sum(marks), problems)


def check_roles(roles: list[str]) -> list[tuple[str, str]]:
    """An optional system turn, then user and assistant by turns, the assistant last."""
    problems = []
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        problems.append(("no_assistant_turn", "there is no answer to learn from"))
    elif turns != ["user", "assistant"] * (len(turns) // 2):
        order = " ".join(roles)
        detail = f"roles are {order:.120}; expected user and assistant by turns, user first and assistant last"
        problems.append(("roles_do_not_alternate", detail))
    return problems
