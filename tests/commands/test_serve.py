"""What is served is what generate.py answers; whoever asks wrongly, too much or without the token is told so."""

import base64
import io
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import uvicorn
from PIL import Image
from serve import check_inputs

from finetuning.data.count_tree import learn_forms
from finetuning.inference.answer_queue import AnswerQueue, QueueFull
from finetuning.inference.count_calibration import Calibration
from finetuning.inference.count_distribution import CountReader
from finetuning.inference.generation import answer_batch
from finetuning.inference.openai_api import Limits, make_app
from support.answering import load, picture

TOKEN = "a-token-that-nobody-guesses"
QUESTION = "How many people are in view?"
LIMITS = Limits(max_pixels=50_000_000, max_new_tokens=8, largest_request=2**20)


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def content(url: str, question: str = QUESTION) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


class Running:
    """An app on a free port of this machine, as `serve.py` runs it."""

    def __init__(self, app):
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def asked(tiny_llava):
    return load(tiny_llava, adapter=True)


@pytest.fixture(scope="module")
def service(asked):
    answers = AnswerQueue(*asked, max_new_tokens=8, most=64, batch_size=8)
    running = Running(
        make_app(answers, called="mall", vision=True, limits=LIMITS, token=TOKEN, is_local=True, language="en")
    )
    yield running.url
    running.stop()
    assert not answers.thread.is_alive()


def ask(service: str, request, token: str = TOKEN, **headers) -> httpx.Response:
    headers = ({"Authorization": f"Bearer {token}"} if token else {}) | headers
    with httpx.Client(base_url=service, headers=headers, timeout=60, trust_env=False) as client:
        body = {"content": request} if isinstance(request, bytes) else {"json": request}
        return client.post("/v1/chat/completions", **body)


def test_200_requests_of_8_clients_are_answered_as_generate_answers(service, asked):
    model, processor = asked
    rows = [{"messages": [{"role": "user", "content": QUESTION}], "images": [picture(number)]} for number in range(10)]
    expected = {"mall": answer_batch(model, processor, rows, max_new_tokens=8)}
    with model.disable_adapter():
        expected["base"] = answer_batch(model, processor, rows, max_new_tokens=8)
    assert len(set(expected["mall"] + expected["base"])) > 5
    urls = [data_url(row["images"][0]) for row in rows]

    def one_client(number: int) -> list[tuple[str, int, str]]:
        client = openai.OpenAI(base_url=f"{service}/v1", api_key=TOKEN, max_retries=0)
        given = []
        for turn in range(25):
            name, place = ("mall", "base")[turn % 2], (number + turn) % 10
            messages = [{"role": "user", "content": content(urls[place])}]
            reply = client.chat.completions.create(model=name, messages=messages, temperature=0)
            given.append((name, place, reply.choices[0].message.content))
            assert reply.usage.prompt_tokens > 16  # the picture's tokens are counted
        return given

    with ThreadPoolExecutor(8) as pool:
        given = [answer for answers in pool.map(one_client, range(8)) for answer in answers]
    assert len(given) == 200
    assert all(text == expected[name][place] for name, place, text in given)


def test_streams_conversations_and_short_answers(service):
    client = openai.OpenAI(base_url=f"{service}/v1", api_key=TOKEN, max_retries=0)
    assert [model.id for model in client.models.list()] == ["mall", "base"]
    first = [{"role": "user", "content": content(data_url(picture(0)))}]
    whole = client.chat.completions.create(model="mall", messages=first).choices[0]
    pieces = list(client.chat.completions.create(model="mall", messages=first, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].choices[0].finish_reason == whole.finish_reason
    later = [*first, {"role": "assistant", "content": "3."}, {"role": "user", "content": content(data_url(picture(1)))}]
    assert client.chat.completions.create(model="mall", messages=later).choices[0].message.content
    cut = client.chat.completions.create(model="mall", messages=first, max_tokens=1)
    assert cut.usage.completion_tokens == 1 and cut.choices[0].finish_reason == "length"


def huge_picture() -> str:
    """A PNG of 200 megapixels in 25 kB."""
    return data_url(Image.new("1", (20_000, 10_000)))


REFUSED = [
    ({"messages": "?"}, 400, "messages must be a list of 1 to 64 messages"),
    ({"messages": []}, 400, "messages must be a list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "has the role 'tool'"),
    ({"messages": [{"role": "user", "content": "   "}]}, 400, "must be a user's question with words"),
    ({"messages": [{"role": "user", "content": "<image>\nHow many?"}]}, 400, "<image> in the text"),
    ({"messages": [{"role": "user", "content": content("/etc/passwd")}]}, 400, "addresses and paths are not opened"),
    ({"messages": [{"role": "user", "content": content("file:///etc/passwd")}]}, 400, "addresses and paths"),
    ({"messages": [{"role": "user", "content": content("http://127.0.0.1:1/x.png")}]}, 400, "addresses and paths"),
    ({"messages": [{"role": "user", "content": content("data:image/png;base64,%%%")}]}, 400, "no base64"),
    ({"messages": [{"role": "user", "content": content("data:image/png;base64,AAAA")}]}, 400, "cannot be used"),
    ({"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7}, 400, "answers are greedy here"),
    ({"messages": [{"role": "user", "content": "Hi"}], "tools": []}, 400, "tools: not known here"),
    ({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}, 400, "a whole number from 1 to 8"),
    ({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0}, 400, "a whole number from 1 to 8"),
    ({"messages": [{"role": "user", "content": "Hi"}], "model": ["mall"]}, 404, "is not served here"),
    ({"messages": [{"role": "user", "content": "Hi"}], "model": "gpt-4o"}, 404, "'gpt-4o' is not served here: mall"),
    (b"{", 400, "the request is not JSON"),
    (b"[1]", 400, "not a JSON object"),
    (b"x" * 2**21, 413, "larger than 1 MiB"),
]


@pytest.mark.parametrize(("request_", "status", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_answered_is_refused_in_one_sentence(service, request_, status, words):
    reply = ask(service, request_)
    message = reply.json()["error"]["message"]
    assert reply.status_code == status and words in message and "\n" not in message and len(message) < 200


def test_pictures_of_200_megapixels_wrong_tokens_and_other_hosts_are_refused(service):
    reply = ask(service, {"messages": [{"role": "user", "content": content(huge_picture())}]})
    assert reply.status_code == 400 and "50,000,000" in reply.json()["error"]["message"]
    for token in ("", "another", TOKEN + "x"):
        reply = ask(service, {"messages": [{"role": "user", "content": "Hi"}]}, token=token)
        assert reply.status_code == 401 and reply.json()["error"]["message"].startswith("wrong or no token")
    # A web page elsewhere whose name was made to point here (DNS rebinding).
    assert ask(service, {"messages": []}, Host="example.org").status_code == 400
    with httpx.Client(base_url=service, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").json()["status"] == "ok"
        for path in ("/../etc/passwd", "/%2e%2e/etc/passwd", "/file=/etc/passwd", "/docs"):
            reply = client.get(path)
            assert reply.status_code == 404 and "nothing is here" in reply.json()["error"]["message"]


def test_the_page_shows_both_models_and_asks_for_the_token(service):
    page = httpx.get(service, trust_env=False).text
    assert 'data-model="base"' in page and 'data-model="mall"' in page
    assert 'id="token"' in page and TOKEN not in page and "script-src 'nonce-" in page


def test_a_question_of_training_is_answered_with_its_count_and_interval(asked):
    forms = learn_forms([QUESTION] * 3, ["There are 2.", "There are 3.", "There are 4."], [2, 3, 4])
    reader, calibration = CountReader(*asked, forms, largest=20), Calibration(width=1.0, rows=400)
    answers = AnswerQueue(*asked, max_new_tokens=4, most=8, reader=reader, calibration=calibration)
    app = make_app(answers, called="mall", vision=True, limits=LIMITS, token=None, is_local=True, language="ko")
    running = Running(app)
    try:
        messages = [{"role": "user", "content": content(data_url(picture(0)))}]
        found = ask(running.url, {"messages": messages}).json()["count"]
        assert 0 <= found["low"] <= found["count"] <= found["high"] <= 20 and 0 < found["probability"] <= 1
        assert "count" not in ask(running.url, {"messages": messages, "model": "base"}).json()
        assert "count" not in ask(running.url, {"messages": [{"role": "user", "content": "Hi"}]}).json()
        page = httpx.get(running.url, trust_env=False).text
        assert f">{QUESTION}</textarea>" in page and 'id="token"' not in page and "원본 모델" in page
    finally:
        running.stop()


def test_a_full_queue_refuses_and_a_bad_row_harms_no_other(asked, monkeypatch):
    started, goes_on = threading.Event(), threading.Event()
    plain = AnswerQueue._reply

    def waits(self, jobs, name):
        started.set()
        goes_on.wait(30)
        return plain(self, jobs, name)

    monkeypatch.setattr(AnswerQueue, "_reply", waits)
    answers = AnswerQueue(*asked, max_new_tokens=4, most=3, batch_size=4)
    row = {"messages": [{"role": "user", "content": QUESTION}], "images": [picture(0)]}
    futures = [answers.submit(row)]
    started.wait(30)
    futures += [answers.submit(row | {"images": [b"no picture"]}), answers.submit(row, "base"), answers.submit(row)]
    with pytest.raises(QueueFull):
        answers.submit(row)
    goes_on.set()
    assert futures[0].result(30).text == futures[3].result(30).text and futures[2].result(30).text
    with pytest.raises(ValueError, match="picture 1"):
        futures[1].result(30)
    answers.close()
    with pytest.raises(QueueFull):
        answers.submit(row)


def test_what_serve_needs_is_said_at_once(tiny_llava, tmp_path, monkeypatch):
    options = Namespace(model=str(tiny_llava), host="0.0.0.0", port=8000)
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    monkeypatch.setattr("serve.check_address", lambda *_: None)
    with pytest.raises(ValueError, match="a token is needed: export SERVE_TOKEN"):
        check_inputs(options)
    monkeypatch.setenv("SERVE_TOKEN", "short")
    with pytest.raises(ValueError, match="the token has 5 characters, expected at least 16"):
        check_inputs(options)
    monkeypatch.delenv("SERVE_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("SERVE_TOKEN_FILE", str(tmp_path / "token"))
    assert check_inputs(options) == TOKEN
    monkeypatch.delenv("SERVE_TOKEN_FILE")
    options.host = "127.0.0.1"
    assert check_inputs(options) is None


def test_an_address_that_is_taken_is_named(tiny_llava, monkeypatch):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    running = Running(lambda scope, receive, send: None)
    port = int(running.url.rpartition(":")[2])
    try:
        with pytest.raises(ValueError, match=rf"--port {port}: cannot listen there \(Address already in use\)"):
            check_inputs(Namespace(model=str(tiny_llava), host="127.0.0.1", port=port))
    finally:
        running.stop()
