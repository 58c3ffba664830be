"""What the keys of a record say beside its conversation: pictures, a system prompt, what is not to be learnt.

Nothing that changes what is learnt is passed over: it is obeyed, or the record is rejected. Other keys are counted.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetuning.flags import TASK_NAMES as TASK_NAMES  # what rows can be
from preparing.conversations import (
    CONTENT_KEYS,
    ROLE_KEYS,
    TOOL_KEYS,
    Turns,
    as_picture,
    is_empty,
    looks_like_picture,
    plain_key,
    read_content,
    read_mask,
    read_turns,
)

CONVERSATION_KEYS = ("conversations", "messages", "conversation", "dialogue", "dialog", "dialogs", "chat", "turns")
PICTURE_KEY = re.compile(
    r"(?:input|source|src|main|query|user|local)?(?:image|img|picture|photo|pic|frame|pixel|pixelvalue)s?"
    r"(?:path|filename|filepath|file|name|url|uri|src|source|link|location|base64|b64|bytes|data)?s?(?P<number>\d+|[ab])?"
)
FILE_KEY = re.compile(r"(?:file|filename|filepath|path)s?")
MEDIA_KEY = re.compile(r"(?:input)?(?:video|audio)s?(?:path|filename|filepath|file|url|uri|src|bytes|data|clip)?s?")
# What a record is about where no picture is named: of a video alone (ActivityNet, MSVD), or a file that is not read here.
MEDIA_NOTE = re.compile(
    r"(?:video|vid|clip|youtube|yt|audio|speech)s?(?:id|uid|name|idx|index)s?|mp4|webm|wav|mp3|flac"
)
MEDIA_NAME = re.compile(
    r"\.(?:mp4|avi|mov|mkv|webm|m4v|mpe?g|wmv|flv|wav|mp3|flac|m4a|ogg|opus|aac|pdf|docx?|pptx?|ply|pcd|las|obj|glb|npy|npz)$",
    re.IGNORECASE,
)
SYSTEM_KEY = re.compile(
    r"(?:\w*sys(?:tem)?(?:prompt|message|msg|instruction)|(?:default|custom|initial|base|chat|model|instruction)?system"
    r"|sys(?:tem)?(?:content|text|role)?|preamble|developer(?:prompt|message|msg|instruction))s?"
)
# Of keys that begin with `system`, those that say no words.
SYSTEM_NOTES = re.compile(r"system\w*(?:fingerprint|id|name|version|type|info|hash|length|tokens?)$")
PREFERENCE_KEY = re.compile(r"(?:chosen|rejected|prefer|dispreferred).*|(?:win|lose)(?:ner|r)?(?:response|answer)")
# What marks a wrong answer where it is false.
KTO_KEYS = (
    *(
        "label",
        "ktotag",
        "ktolabel",
        "desirable",
        "correct",
        "iscorrect",
        "good",
        "isgood",
        "valid",
        "isvalid",
        "preferred",
    ),
    *("accepted", "approved", "isdesirable"),
)
# A question and an answer in keys of their own; beside a conversation they must say what it says.
PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))


def say_problem(error: ValueError) -> tuple[str, str]:
    """(reason, detail) of an error of this module."""
    return error.args if len(error.args) == 2 else ("bad_record", str(error))


def read_conversation_of(raw: Mapping[str, Any]) -> tuple[Turns | None, bool, set[str]]:
    """(the conversation, whether its marks may be left out, keys that it was read from); None where there is none.

    Raises ValueError(reason, detail) where the record holds two conversations that differ.
    """
    found: dict[str, Turns] = {}
    preferences = [
        key
        for key, value in raw.items()
        if PREFERENCE_KEY.fullmatch(plain_key(key)) and not is_empty(value) and not says_right(key, value)
    ]
    if preferences:
        detail = (
            f"{', '.join(preferences)}: preferences are not learnt here; keep the answer that is right, in messages"
        )
        raise ValueError("preference_data", detail)
    for key, value in raw.items():
        turns = [turn for turn in value if isinstance(turn, Mapping)] if isinstance(value, list) else []
        like_turns = bool(turns) and all(
            any(turn.get(name) is not None for name in ROLE_KEYS) and any(name in turn for name in CONTENT_KEYS)
            for turn in turns
        )
        if value is not None and (plain_key(key) in CONVERSATION_KEYS or like_turns):
            found[key] = read_turns(json_list(value), masks_and_pictures=True)
    if raw.get("question") is not None and raw.get("answer") is not None and not found:
        pair = [{"role": "user", "content": raw["question"]}, {"role": "assistant", "content": raw["answer"]}]
        return read_turns(pair, masks_and_pictures=True), True, {"question", "answer"}
    if not found:
        return None, True, set()
    first, *others = found
    for key in others:
        if (found[key].messages, found[key].problems) != (found[first].messages, found[first].problems):
            raise ValueError("two_conversations", f"{first} and {key} differ: leave the one that is meant")
    texts = "\n".join(message["content"] for message in found[first].messages)
    for pair in PAIRS:
        if all(isinstance(raw.get(key), str) and raw[key].strip() for key in pair):
            words = [read_content(raw[key]).text for key in pair]
            if not all(word in texts for word in words):
                detail = f"{first} and {' with '.join(pair)} differ: leave the one that is meant"
                raise ValueError("two_conversations", detail)
    if not is_empty(raw.get("history")):
        raise ValueError("two_conversations", f"history is not empty: put its turns into {first}")
    # In LLaVA's own form a record with a picture has its mark.
    return found[first], plain_key(first) != "conversations", set(found)


def says_right(key: str, value: Any) -> bool:
    """Whether a flag of a preference says that the answer is the right one: `rejected: false`, `chosen: true`."""
    return isinstance(value, bool) and value != plain_key(key).startswith(("rejected", "dispreferred"))


def json_list(value: Any) -> Any:
    """A list written as JSON text, as CSV files hold it; other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def obey_other_keys(
    raw: Mapping[str, Any], messages: list[dict[str, Any]], used: set[str], kept: Iterable[str]
) -> None:
    """Puts a system prompt and a record's masks into `messages`; adds the keys that it obeyed to `used`.

    `kept` are columns that the user keeps as ground truth. Raises ValueError(reason, detail) for what cannot be obeyed.
    """
    system: dict[str, str] = {}
    for key, value in raw.items():
        name = plain_key(key)
        if key in used or key in kept or is_empty(value):
            continue
        if name in KTO_KEYS and str(value).strip().lower() in ("false", "0", "0.0", "no", "undesirable", "bad"):
            detail = (
                f"{key} is {value!r:.20}, which marks a wrong answer; if it is a class, keep it: --columns {key}:int64"
            )
            raise ValueError("preference_data", detail)
        if name in TOOL_KEYS:
            raise ValueError("tool_calls", f"{key} is {value!r:.60}: tools are not part of what is learnt here")
        if MEDIA_KEY.fullmatch(name):
            raise ValueError("video_or_audio", f"{key} is {value!r:.60}: pictures and text are learnt only")
        if SYSTEM_KEY.fullmatch(name) or (name.startswith("system") and not SYSTEM_NOTES.match(name)):
            system[key] = system_words(key, value)
            used.add(key)
        elif obey_mask(key, value, messages):
            used.add(key)
    if system:
        words = {*system.values(), *(message["content"] for message in messages if message["role"] == "system")}
        if len(words) > 1:
            detail = f"{', '.join(system)} and the conversation hold different system prompts: leave one"
            raise ValueError("two_system_prompts", detail)
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": words.pop()})


def system_words(key: str, value: Any) -> str:
    """The text of a system prompt. Raises ValueError where it is no text or holds an image mark."""
    if not isinstance(value, str):
        raise ValueError("bad_content", f"{key} is {value!r:.60}, expected the text of a system prompt")
    content = read_content(value)
    if content.pictures:
        raise ValueError("misplaced_image_mark", f"{key} holds an image mark; pictures belong to user turns")
    return content.text


def obey_mask(key: str, value: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether `key` said what is learnt of the record, or of each of its turns; then `messages` say so too."""
    value = json_list(value)
    try:
        if not isinstance(value, list):
            told = read_mask(key, value)
            if told is False:
                raise ValueError("masked_turn", f"{key} is {value!r:.20}: the record is marked as not to be learnt")
            return told is not None
        if read_mask(key, 1) is None:
            return False
        told = [read_mask(key, entry) for entry in value]
    except ValueError as error:
        if len(error.args) == 2:
            raise
        raise ValueError("unclear_mask", str(error)) from error
    answers = [message for message in messages if message["role"] == "assistant"]
    of_all = len(told) == len(messages)
    if None in told or not (of_all or len(told) == len(answers)):
        detail = f"{key} has {len(told)} entries for {len(messages)} turns and {len(answers)} answers"
        raise ValueError("unclear_mask", detail)
    for message, learnt in zip(messages if of_all else answers, told, strict=True):
        if learnt and message["role"] != "assistant":
            raise ValueError("unclear_mask", f"{key} marks a {message['role']} turn: only answers are learnt")
        if not learnt and message["role"] == "assistant":
            message["weight"] = 0
    if all(message.get("weight") == 0 for message in answers):
        raise ValueError("masked_turn", f"{key} marks each of its answers as not to be learnt")
    return True


def name_pictures(raw: Mapping[str, Any], used: set[str]) -> list[str | bytes]:
    """The pictures that the record's keys name, in order; the keys are added to `used`.

    `image` and `images` name pictures whatever they hold. Keys that are called alike (`img`, `image_path`, `photo_file`) do
    where they hold text, numbered ones (`image_1`, `image_2`) in their order; a name of a picture under any other key does
    where there is none of those. Raises ValueError(reason, detail).
    """
    told: dict[str, list[str | bytes]] = {}
    weak: dict[str, list[str | bytes]] = {}
    numbered: list[tuple[str, str]] = []
    for key, value in raw.items():
        if key in used or is_empty(value):
            continue
        match = PICTURE_KEY.fullmatch(plain_key(key))
        if match and (plain_key(key) in ("image", "images") or not isinstance(value, (bool, int, float))):
            told[key] = read_names(key, value)
            if match["number"]:
                numbered.append((match["number"].zfill(9), key))
        elif names := picture_names_in(value):
            weak[key] = read_names(key, names)
    if not (told or weak):
        for key, value in raw.items():
            noted = MEDIA_NOTE.fullmatch(plain_key(key)) and not is_empty(value)
            if key not in used and (noted or names_media(value)):
                raise ValueError("video_or_audio", f"{key} is {value!r:.60}: pictures and text are learnt only")
    plain = [key for key in told if key not in {key for _, key in numbered}]
    first = next((key for key in plain if plain_key(key) in ("images", "image")), plain[0] if plain else None)
    others = [key for key in plain if key != first]
    if first is None and not numbered:
        first, *others = weak or [None]
    elif first is not None:
        others += [key for key in weak if FILE_KEY.fullmatch(plain_key(key))]
    told |= weak
    for key in others:
        if same_pictures(told[first], told[key]):
            used.add(key)
        elif not all(isinstance(name, str) and "://" in name for name in told[key]):
            raise ValueError("two_pictures", f"{first} is {told[first]!r:.60}, but {key} is {told[key]!r:.60}")
    chosen = [key for key in (first, *(key for _, key in sorted(numbered))) if key is not None]
    used.update(chosen)
    return local_pictures(chosen, [name for key in chosen for name in told[key]])


def names_media(value: Any) -> bool:
    """Whether a value names a video, a sound or another file that is no picture, also inside a list or an object."""
    if isinstance(value, Mapping):
        return any(map(names_media, value.values()))
    if isinstance(value, list):
        return any(map(names_media, value))
    # A name has no spaces around its dot, and is no prose that ends in one.
    return isinstance(value, str) and len(value) < 300 and "\n" not in value and bool(MEDIA_NAME.search(value.strip()))


def read_names(key: str, value: Any) -> list[str | bytes]:
    """Names, addresses or bytes of pictures under a key. Raises ValueError for what is no picture."""
    value = json_list(value)
    if isinstance(value, str) and all(map(looks_like_picture, pieces := re.split(r"\s*[,;|]\s*", value.strip()))):
        value = pieces
    names = []
    for one in value if isinstance(value, list) else [value]:
        try:
            # An address of the web is kept as it is: it matters only where no file is named.
            picture = one if isinstance(one, str) and re.match(r"\s*https?://", one) else as_picture(one)
        except ValueError as error:
            raise ValueError("bad_image", f"{key}: {error}") from error
        if picture is None:
            raise ValueError("bad_image", f"{key} is {value!r:.60}: one of its names is empty")
        if isinstance(picture, str) and MEDIA_NAME.search(picture.strip()):
            raise ValueError("video_or_audio", f"{key} is {picture!r:.60}: pictures and text are learnt only")
        names.append(picture)
    return names


def picture_names_in(value: Any) -> list[str]:
    """Names of pictures that a value of any key holds: alone, in a list of nothing else, or once in an object."""
    if isinstance(value, Mapping):
        names = [one for one in value.values() if looks_like_picture(one)]
        return names if len(names) == 1 else []
    value = json_list(value)
    names = value if isinstance(value, list) else [value]
    return names if all(map(looks_like_picture, names)) else []


def local_pictures(keys: list[str], names: list[str | bytes]) -> list[str | bytes]:
    """The same names. Raises ValueError for an address of the web: nothing is downloaded."""
    for name in names:
        if isinstance(name, str) and "://" in name:
            detail = (
                f"{', '.join(keys)}: {name:.80} is not on this machine: download it, and write its name inside --images"
            )
            raise ValueError("bad_image", detail)
    return names


def same_pictures(left: list[str | bytes], right: list[str | bytes]) -> bool:
    """Whether two keys name the same files, one of them perhaps with its folder or as an address."""

    def last(name: str | bytes) -> str | bytes:
        return re.split(r"[\\/]", name.partition("?")[0])[-1].casefold() if isinstance(name, str) else name

    return [last(name) for name in left] == [last(name) for name in right]


def unfilled_placeholder(messages: list[dict[str, Any]], names: Iterable[str]) -> str | None:
    """A placeholder that stands for one of the record's own keys, and would be taught as words: {count}, <count>."""
    known = {name.casefold() for name in names}
    pattern = re.compile(r"\{\{?\s*(\w+)\s*\}\}?|<(\w+)>|\[(\w+)\]|\$\{?(\w+)\}?|%\((\w+)\)[sd]")
    for message in messages:
        for match in pattern.finditer(message["content"]) if re.search(r"[{<\[$%]", message["content"]) else ():
            if next(filter(None, match.groups())).casefold() in known:
                return match[0]
    return None
