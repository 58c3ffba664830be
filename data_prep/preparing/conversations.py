"""Conversations in the forms that people keep them, turned into one: a list of {"role", "content": str}."""

import base64
import binascii
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import datasets

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
IMAGE_MARK = "<image>"
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")

# Column names that training or TRL reads; another meaning under one of them would change what is trained.
RESERVED_COLUMNS = ("messages", "images", "image", "image_id", "row", "conversations", "prompt", "completion", "text")

MESSAGES_FEATURE = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
# Where turns are not to be learnt. The name is that of OpenAI's fine-tuning format: 1, or 0 for such a turn.
WEIGHTED_MESSAGES_FEATURE = datasets.List(
    {"role": datasets.Value("string"), "content": datasets.Value("string"), "weight": datasets.Value("int64")}
)
IMAGES_FEATURE = datasets.List(datasets.Image())

_KINDS = (
    r"(?:image(?:[ _-]?(?:here|pad|placeholder|token))?|img(?:[ _-]?(?:here|pad|placeholder|token|context))?|picture)"
)
# Marks of other tools that stand for one picture each, in either case: <img>, <ImageHere>, <|image_1|>, [IMG], ...
MARK = re.compile(rf"<\|?{_KINDS}(?:[ _-]?(?P<number>\d+))?\s*/?\|?>|\[IMG\]", re.IGNORECASE)
# What stands around them, and around pictures that are written out as many marks.
WRAPPED = re.compile(
    r"<\|vision_start\|>\s*(?:<\|image_pad\|>\s*)+<\|vision_end\|>"
    r"|<im_start>\s*(?:<im_patch>\s*|<image>\s*)+<im_end>"
    rf"|<(img|image)>\s*(?:<\|?{_KINDS}\|?>\s*)+</\1>",
    re.IGNORECASE,
)
# Marks that name the picture: <img>a.jpg</img> as Qwen-VL writes it, an HTML tag, Markdown.
NAMED = re.compile(
    r"(?:Picture \d+:\s*)?<(img|image|picture)>\s*(?P<inside>[^<>]+?)\s*</\1>"
    r"|<img\b[^<>]*?\bsrc\s*=\s*[\"']?(?P<source>[^\"'<>\s]+)[\"']?[^<>]*>"
    r"|!\[[^\]\n]*\]\((?P<link>[^()\s]+)(?:\s[^()]*)?\)",
    re.IGNORECASE,
)
# What else looks like a mark for a picture, and would be taught as words.
_words = r"(?:image|img|picture|photo|이미지|사진|그림|画像|图片|图像)"
UNKNOWN_MARK = re.compile(
    rf"<[^<>\n='\"]{{0,40}}(?:{_words}|vision_|pixel|im_patch|im_start|im_end)[^<>\n]{{0,200}}>"
    r"|<\|?_*(?:media|frame|visual)s?(?:[ _-]?(?:pad|placeholder|token|start|end|input))?(?:[ _-]?\d+)?_*\s*/?\|?>(?![\s\S]*</)"
    rf"|\[/?{_words}(?:[ _:-][^\]\n]*|\d+)?\]"
    rf"|\{{\{{?\s*{_words}\w*\s*\}}?\}}"
    rf"|[＜《【［｛]\s*{_words}[ _-]?\w*\s*[＞》】］｝]"  # full width
    rf"|&lt;\|?/?\s*{_words}[^&\n]{{0,40}}&gt;"  # escaped for a web page
    rf"|%{_words}\w*%|\$\{{?{_words}s?\b\}}?|\b_*(?:DEFAULT_)?IMAGE_(?:TOKEN|PLACEHOLDER|HERE)_*\b"
    rf"|(?:^|(?<=\n))\s*\({_words}s?\)",
    re.IGNORECASE,
)
SIGNS_OF_MARKS = re.compile(r"[<\[{＜《【［｛%$(]|&lt;|image_", re.IGNORECASE)
# What chat templates put around turns. Most are control tokens to a tokenizer, wherever they stand.
CONTROL_TOKEN = re.compile(
    r"</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<\|(?:im_(?:start|end)|eot_id|eom_id|end_of_text"
    r"|begin_of_text|endoftext|endofchunk|endofprompt|(?:start|end)_header_id|system|user|assistant|end|return|message|channel)\|>"
    r"|<\|?reserved_special_token_\d+\|?>|<｜[^<>\n]{1,40}｜>",
    re.IGNORECASE,
)
MEDIA_MARK = re.compile(
    r"<[|/]?(?:video|vid|audio|speech|sound|music|voice|point_?cloud)(?:[ _-]?(?:here|pad|placeholder|token|bos|eos|start|end))?"
    r"(?:[ _-]?\d+)?\s*/?\|?>|<(?:movie|clip|point|pcd)>(?![\s\S]*</)|<(?:video|audio)\b[^<>]*>|\[(?:video|audio)(?:[ _-]?\d+)?\]",
    re.IGNORECASE,
)

# Keys of a turn or a record that say whether it is learnt: true means so; true means not so; nobody knows.
LEARNT_KEY = re.compile(
    r"(?:sample|example|record|turn|token|answer|response|assistant|message)?(?:weight|lossweight|lossmask)(?:es|s)?"
    r"|\w*loss(?:es)?|(?:do|is|to)?(?:train|trainable|trained|training|supervised?|supervision|learn|learnable|learnt|learned)"
    r"|train(?:able)?(?:on)?(?:this)?(?:turn|message|answer|mask)?s?"
    r"|(?:is|use|used|usable|include|included|in|keep|kept)?(?:for|in)?(?:the)?train(?:ing)?"
    r"|(?:is|do|use|used)?(?:for)?fine?tun(?:e|ed|ing|able)|lossscales?|backprop(?:agate)?|(?:requires?|with|has)?grad(?:ient)?s?"
)
SKIPPED_KEY = re.compile(
    r"(?:is|to)?(?:masked|ignored?|skip(?:ped)?|excluded?)|(?:dont|not?)train"
    r"|(?:no|skip|ignored?|without|mask(?:ed)?|excluded?|notin)(?:from|in)?(?:the)?(?:loss|train(?:ing)?)"
    r"|(?:is)?(?:context|prompt|input|history|eval(?:uation)?|inference)only"
)
UNCLEAR_KEY = re.compile(
    r"(?:\w*mask\w*|train(?:able)?(?:on|only|last|first|final|turn|message|answer)\w*|\w*lossweight\w*|loss(?:on|for|scope)\w*"
    r"|supervis\w+|only(?:the)?(?:last|final|first)\w*|(?:last|final|first)(?:turn|answer|message|response|round)?only)s?"
)
# These mean so of a turn or a record where they are a truth value, and something else where they are text or numbers.
LEARNT_FLAG = re.compile(r"(?:is)?target|keep|kept")
TOOL_KEYS = ("toolcalls", "toolcall", "functioncall", "functioncalls", "tools", "functions")


class Turns(NamedTuple):
    """One conversation, checked. `messages` is meant for use only when `problems` is empty.

    Texts hold no image marks, but where pictures stand in several turns or in a later one: there each user turn begins
    with as many lines `<image>` as it shows pictures. A message that is not to be learnt has `weight` 0.
    """

    messages: list[dict[str, Any]]
    num_image_marks: int
    problems: list[tuple[str, str]]  # (reason, detail) as the ledger wants them
    # For each image mark the picture that it names, as `as_picture` gives it, or None.
    pictures: Sequence[str | bytes | None] = ()
    unused: Sequence[str] = ()  # keys of turns and parts that are not used, with repetition


class Content(NamedTuple):
    text: str
    pictures: list[str | bytes | None]
    unused: list[str]


@lru_cache(maxsize=1024, typed=True)  # records of a file have the same keys
def plain_key(key: Any) -> str:
    """A key as it is compared: `image_path`, `imagePath` and `Image Path` are one."""
    return re.sub(r"[\W_]", "", str(key).lower())


def is_empty(value: Any) -> bool:
    """Whether nothing is said: None, NaN (an empty cell of pandas), empty text (as JSON too), list or object."""
    if isinstance(value, float):
        return value != value
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}")) or value in ([], {}, ())


def as_picture(value: Any) -> str | bytes | None:
    """What a value says of a picture: a file's name, the file's bytes, or None (nothing is said).

    Taken are names, `file://` addresses, data URIs, base64, bytes, and objects that hold one of them, such as
    `{"bytes": ..., "path": ...}`, `{"url": ...}` and `{"data": ...}`. Raises ValueError for anything else.
    """
    if is_empty(value):
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        for key in (
            "bytes",
            "base64",
            "data",
            "path",
            "image",
            "file_name",
            "filename",
            "file",
            "url",
            "image_url",
            "name",
        ):
            if not is_empty(value.get(key)):
                return as_picture(value[key])
        raise ValueError(f"an image is {value!r:.80}, expected bytes or path in it")
    if not isinstance(value, str):
        raise ValueError(f"expected the name of an image or a list of names, got {value!r:.80}")
    name = value.strip()
    if name.startswith("data:"):
        head, _, data = name.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"{name!r:.40} is a data URI without base64")
        return from_base64(data)
    if re.match(r"[a-z][a-z0-9+]+://", name, re.IGNORECASE):
        if name.lower().startswith("file://"):
            return re.sub(r"^file://(?:localhost)?", "", name, flags=re.IGNORECASE)
        raise ValueError(f"{name!r:.80} is not on this machine: download it, and write its name inside --images")
    # A file's name has a dot, or is short; base64 has no dot, and no picture is so small.
    if len(name) > 255 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}", name):
        return from_base64(name)
    return value


def from_base64(data: str) -> bytes:
    """Bytes of base64 text. Raises ValueError where it does not decode."""
    try:
        return base64.b64decode(re.sub(r"\s", "", data), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 does not decode ({error})") from error


def read_content(content: Any) -> Content:
    """The text of a message without marks, normalised to NFC, and what its pictures are.

    Content is text, or a list of typed parts in the forms of transformers, Qwen, OpenAI, Anthropic and the vsft datasets.
    Raises ValueError(reason, detail) for anything else, and for marks that are not understood.
    """
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    elif isinstance(content, Mapping):
        parts = [content]
    else:
        detail = f"content is {type(content).__name__}, expected text or a list of typed parts"
        raise ValueError("bad_content", detail)
    texts: list[str] = []
    pictures: list[str | bytes | None] = []
    unused: list[str] = []
    for part in parts:
        kind, value = kind_of_part(part)
        if kind == "image":
            pictures.append(value)
        else:
            text, of_text = read_text_of_part(value)
            texts.append(text)
            pictures += of_text
        used = (
            "type",
            "text",
            "image",
            "image_url",
            "input_image",
            "path",
            "url",
            "base64",
            "bytes",
            "source",
            "index",
        )
        unused += [f"parts.{key}" for key, held in part.items() if key not in used and held is not None]
    text = "\n".join(filter(None, texts))
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which no dataset can
        raise ValueError("bad_content", f"{error.reason}: {text[error.start - 20 : error.start]!r} ...") from error
    return Content(text, pictures, unused)


def kind_of_part(part: Any) -> tuple[str, Any]:
    """("text", its text) or ("image", what is said of the picture) of a typed part."""
    if not isinstance(part, Mapping):
        raise ValueError("bad_content", f"a content part is {part!r:.80}, expected one of type text or image")
    kind = str(part.get("type") or next((key for key in part if not is_empty(part[key])), ""))
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError("bad_content", f"a text part holds {part.get('text')!r:.80}, expected a string")
        return "text", part["text"]
    if re.search(r"video|audio|speech|sound", kind):
        raise ValueError("video_or_audio", f"a content part is of type {kind}: pictures and text are learnt only")
    if kind in ("image", "image_url", "input_image", "image_pil", "image_path"):
        said = [
            part[key] for key in (kind, "image", "image_url", "path", "url", "base64", "bytes", "source") if key in part
        ]
        try:
            return "image", as_picture(next((value for value in said if not is_empty(value)), None))
        except ValueError as error:
            raise ValueError("bad_image", str(error)) from error
    raise ValueError("bad_content", f"a content part is {part!r:.80}, expected one of type text or image")


def read_text_of_part(text: str) -> tuple[str, list[str | bytes | None]]:
    """(text without marks, in NFC; what each mark names, or None). Raises ValueError(reason, detail)."""
    text = unicodedata.normalize("NFC", text)
    if not SIGNS_OF_MARKS.search(text):
        return text.strip(), []
    if found := CONTROL_TOKEN.search(text):
        detail = f"{found[0]} belongs to a chat template: leave it out, that of the model adds its own"
        raise ValueError("control_token", detail)
    if found := MEDIA_MARK.search(text):
        raise ValueError("video_or_audio", f"{found[0]} stands in the text: pictures and text are learnt only")
    pictures: list[str | bytes | None] = []
    numbers: list[int] = []

    def named(match: re.Match) -> str:
        name = match["inside"] or match["source"] or match["link"]
        if match["link"] and not looks_like_picture(name):
            return match[0]
        try:
            pictures.append(as_picture(name))
        except ValueError as error:
            raise ValueError("bad_image", str(error)) from error
        return f"{IMAGE_MARK}\0"

    text = WRAPPED.sub(IMAGE_MARK, text)
    text = NAMED.sub(named, text)
    if pictures and any(not text[match.end() :].startswith("\0") for match in MARK.finditer(text)):
        raise ValueError("image_mark_count", "of its image marks some name a picture and some do not")
    text = text.replace("\0", "")
    if not pictures:
        numbers = [int(match["number"]) for match in MARK.finditer(text) if match["number"]]
        pictures = [None] * len(MARK.findall(text))
    if numbers and (len(numbers) != len(pictures) or numbers != sorted(set(numbers))):
        marks = " ".join(match[0] for match in MARK.finditer(text))
        raise ValueError("misplaced_image_mark", f"the marks are {marks:.80}: pictures are shown in order, once each")
    text = re.sub(rf"[ \t]*(?:{MARK.pattern})[ \t]*\n?", " ", text, flags=re.IGNORECASE).strip()
    if found := UNKNOWN_MARK.search(text):
        detail = f"{found[0]:.60} would be taught as words: write {IMAGE_MARK} where a picture is meant"
        raise ValueError("unknown_image_mark", detail)
    return text, pictures


def looks_like_picture(name: Any) -> bool:
    """Whether a text ends as the name of a picture does, whether or not its kind can be opened."""
    suffix = r"\.(?:jpe?g|jfif|png|webp|bmp|tiff?|gif|hei[cf]|avif|jp2|jxl|ppm|pgm|dcm|svg|dng|cr2|nef|raw)(?:[?#].*)?$"
    return isinstance(name, str) and bool(re.search(suffix, name.strip(), re.IGNORECASE))


def read_mask(key: Any, value: Any) -> bool | None:
    """Whether `key: value` says that something is learnt (True) or not (False); None where it says nothing of that.

    Raises ValueError where it may say so in a way that cannot be obeyed.
    """
    name = plain_key(key)
    learnt, skipped = LEARNT_KEY.fullmatch(name), SKIPPED_KEY.fullmatch(name)
    known = learnt or skipped or UNCLEAR_KEY.fullmatch(name) or LEARNT_FLAG.fullmatch(name)
    if is_empty(value) or not known or looks_like_picture(value):
        return None
    if LEARNT_FLAG.fullmatch(name):
        return {"true": True, "false": False}.get(str(value).strip().lower())
    words = {"true": True, "yes": True, "1": True, "1.0": True, "false": False, "no": False, "0": False, "0.0": False}
    told = words.get(str(value).strip().lower())
    if told is not None and skipped:
        return not told
    if told is not None and learnt:
        return told
    raise ValueError(f"{key} is {value!r:.60}: a turn is learnt or it is not; write weight: 1 or weight: 0")


def keys_of_turn(turn: Mapping) -> tuple[str, str] | None:
    """The keys of who speaks and of what is said: `role` or `from`, `content` or `value`."""
    role = next((key for key in ROLE_KEYS if turn.get(key) is not None), None)
    content = next((key for key in CONTENT_KEYS if turn.get(key) is not None), None)
    return (role, content) if role and content else None


def read_turns(
    raw: Any, role_key: str | None = None, content_key: str | None = None, *, masks_and_pictures: bool = False
) -> Turns:
    """Reads and checks a list of turns; without keys those of each turn are looked for.

    Masked turns (`weight: 0`, `loss: false`, ...) and pictures that a turn names are problems, unless the caller says that
    it obeys them.
    """
    if not isinstance(raw, list) or not raw:
        return Turns([], 0, [("no_turns", f"expected a list of turns, got {raw!r:.80}")])
    messages, contents, problems = [], [], []
    unused: Counter[str] = Counter()
    for number, turn in enumerate(raw, start=1):
        keys = (role_key, content_key) if role_key else keys_of_turn(turn) if isinstance(turn, Mapping) else None
        if keys is None or not isinstance(turn, Mapping) or keys[0] not in turn or keys[1] not in turn:
            if isinstance(turn, Mapping) and any(
                plain_key(k) in TOOL_KEYS and not is_empty(v) for k, v in turn.items()
            ):
                problems.append(("tool_calls", f"turn {number} calls a tool: only text is learnt"))
                continue
            expected = f"{role_key}, {content_key}" if role_key else "role and content, or from and value"
            problems.append(("bad_turn", f"turn {number} is {turn!r:.80}, expected the keys {expected}"))
            continue
        role = ROLES.get(str(turn[keys[0]]).strip().lower())
        if role is None:
            expected = ", ".join(ROLES)
            problems.append(("unknown_role", f"turn {number} is by {turn[keys[0]]!r:.40}, expected one of {expected}"))
            continue
        try:
            content = read_content(turn[keys[1]])
            weight, content, of_turn = read_other_keys(turn, keys, role, content)
        except ValueError as error:
            reason, detail = error.args
            problems.append((reason, f"turn {number}: {detail}"))
            continue
        unused.update([*content.unused, *of_turn])
        if role == "system" and not content.text and not content.pictures:
            continue  # many tools write one, and it says nothing
        if not content.text:
            problems.append(("empty_text", f"turn {number} ({role}) has no text"))
        if weight is False and role == "assistant" and not masks_and_pictures:
            problems.append(("masked_turn", f"turn {number} is not to be learnt, which is not done here"))
        if any(picture is not None for picture in content.pictures) and not masks_and_pictures:
            problems.append(("bad_image", f"turn {number} names its picture in the text, which is not followed here"))
        masked = role == "assistant" and weight is False
        messages.append({"role": role, "content": content.text, **({"weight": 0} if masked else {})})
        contents.append(content)
    if not problems and not messages:
        problems = [("no_turns", "there is nothing but an empty system turn")]
    elif not problems:
        problems = check_roles(messages) + place_marks(messages, [len(content.pictures) for content in contents])
    pictures = [picture for content in contents for picture in content.pictures]
    return Turns(messages, len(pictures), problems, pictures, tuple(unused.elements()))


def read_other_keys(
    turn: Mapping, keys: tuple[str, str], role: str, content: Content
) -> tuple[bool | None, Content, list[str]]:
    """(whether the turn is learnt, its content with the pictures of other keys, keys that are not used)."""
    weight, unused = None, []
    pictures = content.pictures
    for key, value in turn.items():
        if key in keys or value is None:
            continue
        name = plain_key(key)
        if name in TOOL_KEYS and not is_empty(value):
            raise ValueError("tool_calls", f"{key}: only text is learnt")
        if re.fullmatch(r"(?:videos?|audios?|speech|sounds?)(?:path|file|url)?s?", name) and not is_empty(value):
            raise ValueError("video_or_audio", f"{key}: pictures and text are learnt only")
        if re.fullmatch(r"(?:image|img|picture|photo)s?(?:path|file|url|name)?s?", name) and not is_empty(value):
            try:
                named = [as_picture(one) for one in (value if isinstance(value, list) else [value])]
            except ValueError as error:
                raise ValueError("bad_image", f"{key}: {error}") from error
            if pictures and (len(pictures) != len(named) or any(picture is not None for picture in pictures)):
                detail = f"{len(pictures)} image marks, but {len(named)} pictures in {key}"
                raise ValueError("image_mark_count", detail)
            pictures = named
            continue
        try:
            told = read_mask(key, value)
        except ValueError as error:
            raise ValueError("unclear_mask", str(error)) from error
        if told is None:
            unused.append(f"turns.{key}")
        elif told and role != "assistant" and name != "weight":
            raise ValueError("unclear_mask", f"{key} is {value!r:.20} of a {role} turn: only answers are learnt")
        elif weight is not None and weight != told:
            raise ValueError("unclear_mask", "its keys say both that the turn is learnt and that it is not")
        else:
            weight = told
    return weight, Content(content.text, pictures, content.unused), unused


def place_marks(messages: list[dict[str, Any]], num_pictures: list[int]) -> list[tuple[str, str]]:
    """Problems of where pictures stand. Where it is not the first user turn alone, marks are written into the texts."""
    problems = [
        ("misplaced_image_mark", f"turn {place} ({message['role']}) holds a picture; pictures belong to user turns")
        for place, (message, number) in enumerate(zip(messages, num_pictures, strict=True), start=1)
        if number and message["role"] != "user"
    ]
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not problems and any(num_pictures[place] for place in users[1:]):
        for place in users:
            messages[place]["content"] = f"{IMAGE_MARK}\n" * num_pictures[place] + messages[place]["content"]
    return problems


def check_roles(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """An optional system turn, then user and assistant by turns, the assistant last, and something to learn."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        return [("no_assistant_turn", "there is no answer to learn from")]
    if turns != ["user", "assistant"] * (len(turns) // 2):
        order = " ".join(roles)
        detail = f"roles are {order:.120}; expected user and assistant by turns, user first and assistant last"
        return [("roles_do_not_alternate", detail)]
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        return [("masked_turn", "each of its answers is marked as not to be learnt")]
    return []
