"""llama.cpp, built by its user: its converter, its quantiser, and its server, asked as any client asks it."""

import base64
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from finetuning.data.collator import leading_marks
from finetuning.data.pictures import open_picture

BUILD = "cmake -B build && cmake --build build --target llama-quantize llama-server"
# Since May 2025 llama.cpp puts a CLIP tower's class token behind the patches, and reads the features as if it came first:
# every patch has its neighbour's position, and the first one is lost (ggml-org/llama.cpp#25814, a fix is PR 25844).
LLAVA_GRAPH = "tools/mtmd/models/llava.cpp"
CLASS_LAST = "ggml_concat(ctx0, inp, model.class_embedding, 1)"
CLASS_FIRST = "ggml_concat(ctx0, model.class_embedding, inp, 1)"
PATIENCE = 600  # seconds until a server has read its model
TOP = 20  # most likely tokens whose log-probabilities a server is asked for


@dataclass(frozen=True)
class LlamaCpp:
    """Files of a checkout of llama.cpp in which BUILD was run."""

    converter: Path
    quantize: Path
    server: Path

    @property
    def version(self) -> str:
        """What the server calls itself, such as `version: 6123 (79c1160b)`."""
        said = subprocess.run([self.server, "--version"], capture_output=True, text=True, check=False)
        lines = (said.stdout + said.stderr).splitlines()
        return next((line.strip() for line in lines if line.startswith("version")), "unknown")


@dataclass(frozen=True)
class Step:
    """One token of an answer: its id, and the log-probabilities of the most likely ids at its place."""

    token: int
    log_probabilities: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """A server's answer to one row."""

    text: str
    prompt_tokens: int
    steps: list[Step]


def find_llama_cpp(folder: Path, *, vision: bool) -> LlamaCpp:
    """The programs in a checkout. Raises ValueError that says what is not there and how to make it.

    For a LLaVA (`vision`) a checkout that would shift its patches is refused, with the line that mends it.
    """
    found = LlamaCpp(
        folder / "convert_hf_to_gguf.py", folder / "build/bin/llama-quantize", folder / "build/bin/llama-server"
    )
    missing = [str(path) for path in (found.converter, found.quantize, found.server) if not path.is_file()]
    if missing:
        raise ValueError(
            f"--llama_cpp {folder}: no {', '.join(missing)}. Clone https://github.com/ggml-org/llama.cpp and build it "
            f"there: {BUILD}"
        )
    graph = folder / LLAVA_GRAPH
    if vision and graph.is_file() and CLASS_LAST in graph.read_text(encoding="utf-8"):
        raise ValueError(
            f"--llama_cpp {folder}: this version gives a LLaVA shifted patches (ggml-org/llama.cpp#25814). Mend the line, "
            f"and build again: sed -i 's/{CLASS_LAST}/{CLASS_FIRST}/' {graph} && cmake --build {folder}/build --target "
            "llama-server"
        )
    return found


def run(command: Sequence[str | Path], what: str) -> None:
    """Run a program to its end. Raises ValueError with the last lines that it said where it fails."""
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        raise ValueError(f"{what} failed (exit status {ended.returncode}): " + " | ".join(lines[-3:]))


def convert(llama_cpp: LlamaCpp, staged: Path, output: Path) -> None:
    """The language model of a staged folder as a GGUF in fp16. Raises ValueError."""
    command = [sys.executable, llama_cpp.converter, staged, "--outfile", output, "--outtype", "f16"]
    run(command, "llama.cpp's convert_hf_to_gguf.py")


def quantise(llama_cpp: LlamaCpp, source: Path, output: Path, kind: str) -> None:
    """`source` in fp16 -> `output` in a type of llama-quantize, such as Q4_K_M. Raises ValueError."""
    run([llama_cpp.quantize, source, output, kind], f"llama-quantize {kind}")


def free_port() -> int:
    """A TCP port of this machine that nobody listens at just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(llama_cpp: LlamaCpp, model: Path, mmproj: Path | None, context: int, log: Path) -> Iterator[httpx.Client]:
    """A llama-server with a model, on this machine only, as a client to ask it; it is ended afterwards.

    `context` is the longest row in tokens. What the server says goes to `log`. Raises ValueError where it does not start.
    """
    port = free_port()
    command = [llama_cpp.server, "--model", model, "--host", "127.0.0.1", "--port", port, "--ctx-size", context]
    command += ["--parallel", 1, "--jinja", *(["--mmproj", mmproj] if mmproj else [])]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            wait_until_ready(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen, log: Path) -> None:
    """Until the server has read its model. Raises ValueError, with its last words, where it ends or takes too long."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            if client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    raise ValueError("llama-server did not start: " + " | ".join(words[-3:]))


def as_content(question: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """A user's turn as OpenAI's clients send it: pictures as PNG in data URLs, then the question."""
    parts: list[dict[str, Any]] = []
    for image in images:
        data = io.BytesIO()
        open_picture(image).save(data, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": question}]


def as_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the data contract as an OpenAI request's messages, its pictures in the turns that show them."""
    marked = [leading_marks(message) for message in row["messages"]]
    images, is_marked = list(row.get("images") or []), any(number for number, _ in marked)
    messages = []
    for message, (number, text) in zip(row["messages"], marked, strict=True):
        shown = number if is_marked else len(images) if message["role"] == "user" else 0
        content = as_content(text, images[:shown]) if shown else text
        images = images[shown:]
        messages.append({"role": message["role"], "content": content})
    return messages


def ask(client: httpx.Client, rows: Sequence[dict[str, Any]], max_new_tokens: int, description: str) -> list[Answer]:
    """Greedy answers of a llama-server to rows that end with a question. Raises ValueError where it refuses one."""
    answers = []
    for row in tqdm(rows, desc=description, unit="question"):
        request = {
            "messages": as_messages(row),
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "logprobs": True,
            "top_logprobs": TOP,
            "cache_prompt": False,
        }
        reply = client.post("/v1/chat/completions", json=request)
        if reply.status_code != httpx.codes.OK:
            raise ValueError(f"llama-server refused a question: {reply.text[:300]}")
        body = reply.json()
        choice = body["choices"][0]
        steps = [
            Step(place["id"], {token["id"]: token["logprob"] for token in place["top_logprobs"]})
            for place in (choice.get("logprobs") or {}).get("content") or []
        ]
        answers.append(Answer(choice["message"]["content"].strip(), body["usage"]["prompt_tokens"], steps))
    return answers
