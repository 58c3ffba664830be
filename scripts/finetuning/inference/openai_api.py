"""A model over HTTP: OpenAI's chat completions with pictures, and a page to ask on.

Answers are greedy, from the project's own path. Nothing is fetched and no file is opened for a client: a picture comes
inside its request, as a data URL. A request that cannot be answered as it was meant is refused in one sentence.
"""

import asyncio
import base64
import binascii
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from finetuning.data.collator import IMAGE_LINE
from finetuning.data.pictures import PictureError, open_picture
from finetuning.inference.answer_queue import AnswerQueue, QueueFull, Reply
from finetuning.pages import render_page

LARGEST_REQUEST = 32 * 2**20  # bytes: a picture of 24 MB as base64
MOST_MESSAGES = 64
SUGGESTED = 6  # questions of training that a page offers
READERS = 4  # requests that are read at once: a decoded picture can be 150 MB
IMAGE_MARK = IMAGE_LINE.strip()
# Parameters with the values that leave a greedy answer as it is; None: any.
GREEDY: dict[str, tuple | None] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "seed": None,
    "user": None,
    "stream_options": None,
}
READ = ("model", "messages", "max_tokens", "max_completion_tokens", "stream")


class Refused(Exception):
    """A request that is not answered: HTTP status and one sentence for people."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may bring: pixels of a picture, bytes in all; and the longest answer in tokens."""

    max_pixels: int
    max_new_tokens: int
    largest_request: int = LARGEST_REQUEST


@dataclass(frozen=True)
class Wanted:
    """A request as it was understood: row for the model, which model, longest answer, whether as a stream."""

    row: dict[str, Any]
    name: str
    called: str
    max_tokens: int
    stream: bool


def read_data_url(url: Any, max_pixels: int) -> bytes:
    """The picture of a data URL, which was decoded once to see that it can be, and waits as it came: it is smaller so.

    Raises Refused: for addresses and paths, too, which are never opened here.
    """
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:64]:
        raise Refused(
            400, "image_url must be a data URL (data:image/png;base64,...): addresses and paths are not opened here"
        )
    try:
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except binascii.Error:
        raise Refused(400, "image_url holds no base64 after ';base64,'") from None
    try:
        open_picture(data, max_pixels=max_pixels)
    except PictureError as error:
        raise Refused(400, f"the picture cannot be used: {error}") from error
    return data


def read_content(content: Any, limits: Limits) -> tuple[str, list[Any]]:
    """Text and pictures of a message's `content`. Raises Refused."""
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = content
    else:
        raise Refused(400, "content must be a text or a list of parts")
    texts, images = [], []
    for part in parts:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif part.get("type") == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(read_data_url(part["image_url"].get("url"), limits.max_pixels))
        else:
            raise Refused(400, f"a part of type {part.get('type')!r}: expected text or image_url")
    text = " ".join(texts)
    if IMAGE_MARK in text:
        raise Refused(400, f"{IMAGE_MARK} in the text: leave it out, it is put before the text for each picture")
    return text, images


def read_row(messages: Any, limits: Limits, *, vision: bool) -> dict[str, Any]:
    """An OpenAI request's `messages` as a row of the data contract. Raises Refused."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        raise Refused(400, f"messages must be a list of 1 to {MOST_MESSAGES} messages")
    turns, images = [], []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant") and not (role == "system" and number == 0):
            raise Refused(
                400, f"message {number + 1} has the role {role!r}: expected user or assistant, or system first"
            )
        text, shown = read_content(message.get("content"), limits)
        if shown and (role != "user" or not vision):
            raise Refused(400, "pictures belong in a user's message" if vision else "this model reads text only")
        turns.append({"role": role, "content": IMAGE_LINE * len(shown) + text})
        images += shown
    if turns[-1]["role"] != "user" or turns[-1]["content"] in ("", IMAGE_LINE * len(images)):
        raise Refused(400, "the last message must be a user's question with words")
    return {"messages": turns, **({"images": images} if vision else {})}


def read_request(body: bytes, names: dict[str, str], limits: Limits, *, vision: bool) -> Wanted:
    """A chat completion as it is wanted; `names` are what models are called -> `tuned` or `base`. Raises Refused."""
    try:
        request = json.loads(body)
    except ValueError:  # UnicodeDecodeError is one, too
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(request, dict):
        raise Refused(400, "the request is not a JSON object")
    for key, value in request.items():
        if key not in READ and key not in GREEDY:
            raise Refused(400, f"{key}: not known here; answers are greedy and of the parameters {', '.join(READ)}")
        allowed = GREEDY.get(key)
        if allowed is not None and value is not None and value not in allowed:
            raise Refused(400, f"{key} {value!r}: answers are greedy here, leave it out or send {allowed[0]!r}")
    called = request.get("model", next(iter(names)))
    if not isinstance(called, str) or called not in names:
        raise Refused(404, f"model {called!r} is not served here: {', '.join(names)}")
    given = [request[key] for key in ("max_completion_tokens", "max_tokens") if request.get(key) is not None]
    most = given[0] if given else limits.max_new_tokens
    if type(most) is not int or not 1 <= most <= limits.max_new_tokens:
        raise Refused(400, f"max_tokens {most!r}: expected a whole number from 1 to {limits.max_new_tokens}")
    row = read_row(request.get("messages"), limits, vision=vision)
    return Wanted(row, names[called], called, most, bool(request.get("stream")))


def cut(reply: Reply, most: int, longest: int, tokenizer: Any) -> tuple[str, str]:
    """(the text, of at most `most` tokens where that is less than the service's `longest`; OpenAI's reason why it ends)."""
    if reply.answer_tokens < most:
        return reply.text, "stop"
    if most == longest:
        return reply.text, "length"
    tokens = tokenizer.encode(reply.text, add_special_tokens=False)[:most]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip(), "length"


def completion(wanted: Wanted, reply: Reply, longest: int, tokenizer: Any) -> dict[str, Any]:
    """OpenAI's `chat.completion` of a reply. A count with its interval stands beside `choices`, under `count`."""
    text, reason = cut(reply, wanted.max_tokens, longest, tokenizer)
    answer_tokens = min(reply.answer_tokens, wanted.max_tokens)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": wanted.called,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
        ],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": answer_tokens,
            "total_tokens": reply.prompt_tokens + answer_tokens,
        },
        **({"count": reply.count} if reply.count else {}),
    }


def as_stream(whole: dict[str, Any]) -> list[str]:
    """A completion as server-sent events: the answer in one piece, since it is greedy and short."""
    choice = whole["choices"][0]
    pieces = [({"role": "assistant", "content": choice["message"]["content"]}, None), ({}, choice["finish_reason"])]
    head = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    events = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in pieces]
    return [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events] + ["data: [DONE]\n\n"]


async def read_body(request: Request, largest: int) -> bytes:
    """The request's body; no more than `largest` bytes are ever held. Raises Refused."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > largest:
            raise Refused(413, f"the request is larger than {largest // 2**20} MiB: send a smaller picture")
    return bytes(body)


def refusal(error: Refused) -> JSONResponse:
    """OpenAI's form of an error."""
    body = {"error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}}
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    return JSONResponse(body, status_code=error.status, headers=headers)


def model_list(names: Iterable[str]) -> dict[str, Any]:
    """OpenAI's list of the models that are served."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in names]
    return {"object": "list", "data": data}


def make_app(
    answers: AnswerQueue, *, called: str, vision: bool, limits: Limits, token: str | None, is_local: bool, language: str
) -> FastAPI:
    """The service around a queue. `called` names the tuned model; with a `token` all but the page and /health ask for it.

    `is_local`: requests must name this machine as their host, so that no web page elsewhere can ask in a user's browser.
    """
    names = {called: "tuned"} | ({"base": "base"} if "base" in answers.names else {})
    page = render_page(
        "ask.html.jinja",
        title=called,
        language=language,
        names=["base", called] if "base" in names else [called],
        vision=vision,
        questions=answers.counting_questions[:SUGGESTED],
        asks_token=token is not None,
        nonce=secrets.token_urlsafe(16),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(answers.close)

    app = FastAPI(title="Fine-tuned model", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if is_local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return refusal(error)

    @app.exception_handler(Exception)  # starlette writes its trace to the server's log
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return refusal(Refused(500, "the model failed at this question: the server's log says why"))

    @app.exception_handler(404)
    async def unknown(request: Request, _: Exception) -> JSONResponse:
        return refusal(Refused(404, f"{request.url.path}: nothing is here; ask at /v1/chat/completions, or open /"))

    reading = asyncio.Semaphore(READERS)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise Refused(401, "wrong or no token: send it as 'Authorization: Bearer TOKEN', or as api_key of a client")

    @app.get("/")
    async def ask_page() -> Response:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": answers.waiting.qsize()}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_token(request)
        return model_list(names)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_token(request)
        body = await read_body(request, limits.largest_request)
        async with reading:
            wanted = await run_in_threadpool(read_request, body, names, limits, vision=vision)
        try:
            reply = await asyncio.wrap_future(answers.submit(wanted.row, wanted.name))
        except QueueFull:
            raise Refused(429, "too many questions are waiting: ask again in a moment") from None
        except ValueError as error:
            raise Refused(400, str(error)) from error
        whole = completion(wanted, reply, limits.max_new_tokens, answers.tokenizer)
        if wanted.stream:
            return StreamingResponse(iter(as_stream(whole)), media_type="text/event-stream")
        return JSONResponse(whole)

    return app
