"""Serve a model to people and programs: a page to ask on, and OpenAI's chat completions with pictures.

    python scripts/serve.py --model outputs/llava-sample

Then open http://127.0.0.1:8000, or point any OpenAI client at http://127.0.0.1:8000/v1. A run with an adapter answers as
itself and as `base`, side by side on the page. Counting questions of an evaluated run come with an interval. Answers are
greedy and those of generate.py.

Only this machine can ask, unless --host names another address: then each request needs the token that SERVE_TOKEN holds,
or the file that SERVE_TOKEN_FILE names. Nothing is encrypted: put a proxy with TLS before it, or use an SSH tunnel.
"""

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path

from finetuning import command, start
from finetuning.flags import LANGUAGES, asking_parser, positive
from finetuning.model_files import config_of
from finetuning.run_folder import adapter_base, read_count_settings, refuse_unfinished

SHORTEST_TOKEN = 16  # characters


def read_token(problems: list[str]) -> str | None:
    """The token from the environment, directly or as a file; what is wrong with it is added to `problems`."""
    token, path = os.environ.get("SERVE_TOKEN"), os.environ.get("SERVE_TOKEN_FILE")
    if token is None and path is not None:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"SERVE_TOKEN_FILE {path}: cannot be read ({error})")
            return None
    if token is not None and len(token) < SHORTEST_TOKEN:
        problems.append(
            f"the token has {len(token)} characters, expected at least {SHORTEST_TOKEN}: openssl rand -hex 16"
        )
    return token


def is_this_machine(host: str) -> bool:
    """Whether an address is of the loopback interface."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, port: int, problems: list[str]) -> None:
    """Whether one can listen there; what is wrong is added to `problems`."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        problems.append(
            f"--host {host} --port {port}: cannot listen there ({os.strerror(error.errno) if error.errno else error})"
        )


def check_inputs(options: argparse.Namespace) -> str | None:
    """The token, if there is one. Raises ValueError that lists all that is wrong."""
    problems: list[str] = []
    try:
        config_of(adapter_base(Path(options.model)) or options.model)
        refuse_unfinished(Path(options.model))
    except ValueError as error:
        problems.append(f"--model {error}")
    token = read_token(problems)
    if token is None and not is_this_machine(options.host):
        problems.append(
            f"--host {options.host}: others could ask, so a token is needed: export SERVE_TOKEN=$(openssl rand -hex 16)"
        )
    check_address(options.host, options.port, problems)
    if problems:
        raise ValueError("; ".join(problems))
    return token


def main(options: argparse.Namespace) -> None:
    """Load the model and answer until Ctrl-C. Raises ValueError where it cannot be served."""
    token = check_inputs(options)
    try:
        import uvicorn

        start.prepare(adapter_base(Path(options.model)))
        from finetuning.inference.openai_api import Limits, make_app
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -r requirements-serve.txt") from error
    import torch

    from finetuning.inference.answer_queue import AnswerQueue
    from finetuning.inference.count_distribution import CountReader
    from finetuning.inference.count_file import settings_of
    from finetuning.kernels.int8_base import refuse_base_precision, set_base_precision
    from finetuning.models.loading import load_for_inference
    from finetuning.training.origin import refuse_changed_run

    start.imported()

    # The model, and how counts are read where an evaluation kept that
    run, reader, calibration = Path(options.model), None, None
    refuse_changed_run(run, adapter_base(run), None, accept_changes=options.accept_changes)
    refuse_base_precision(options.base_precision)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, processing_class = load_for_inference(options.model, dtype=dtype, load_in_4bit=options.load_in_4bit)
    set_base_precision(model, options.base_precision, run)
    if read_count_settings(run):
        forms, largest, calibration = settings_of(run)
        reader = CountReader(model, processing_class, forms, largest)
    answers = AnswerQueue(
        model,
        processing_class,
        max_new_tokens=options.max_new_tokens,
        most=options.queue,
        batch_size=options.batch_size,
        reader=reader,
        calibration=calibration,
    )

    # The service
    app = make_app(
        answers,
        called=run.name,
        vision=hasattr(model.config, "vision_config"),
        limits=Limits(options.max_megapixels * 10**6, options.max_new_tokens),
        token=token,
        is_local=is_this_machine(options.host),
        language=options.language,
    )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"Page: http://{shown}:{options.port}   OpenAI clients: http://{shown}:{options.port}/v1   Ctrl-C ends it")
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        limit_concurrency=2 * options.queue + 16,  # connections: each may hold a request in memory
        timeout_graceful_shutdown=30,
    )


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = asking_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=positive, default=8000, help="(default %(default)s)")
    parser.add_argument("--queue", type=positive, default=64, help="questions that may wait (default %(default)s)")
    parser.add_argument(
        "--max_megapixels", type=positive, default=50, metavar="N", help="largest picture (default %(default)s)"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of the page (default %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_options(sys.argv[1:])), stopped="ended; what was waiting is refused")
