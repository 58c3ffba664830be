"""Flags that several commands share. Standard library only: a wrong flag is refused at once, with the one that is near."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

LANGUAGES = ("en", "ko")
ENGINES = ("built-in", "vllm")
ANSWERS_KEPT = "stopped. The answers so far are kept: the same command continues"  # what Ctrl-C is answered with
# What rows can be: the names of finetuning.tasks.exam.TASKS.
TASK_NAMES = ("choice", "count", "free_text", "number", "short_answer", "yes_no")


SECRET = re.compile(r"(^|[-_])(token|key|secret|password)$", re.IGNORECASE)
NO_SECRETS = (
    "others can read command lines, recipes and job files: set HF_TOKEN or WANDB_API_KEY in the environment, or log in once "
    "with hf auth login or wandb login. What stood here is no secret any more: revoke it"
)


class Parser(argparse.ArgumentParser):
    """A command's flags: none is abbreviated, and a misspelt one is told which is meant."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """argparse's, with a guess at what was meant; of an unknown flag the name alone: its value may be a secret."""
        if message.startswith(("unrecognized arguments", "the following arguments are required")):
            kind, _, words = message.partition(": ")
            unknown = unknown_flags(words.split() if kind.startswith("un") else sys.argv[1:], self)
            if unknown and kind.startswith("un"):
                message = f"{kind}: {' '.join(unknown)}"
            message += "".join(f"; {word}{did_you_mean(word, self._option_string_actions)[1:]}" for word in unknown)
            if any(map(SECRET.search, unknown)):
                message += f"; {NO_SECRETS}"
        super().error(message)


def unknown_flags(words: Iterable[str], parser: argparse.ArgumentParser) -> list[str]:
    """The words that look like flags, and are none of `parser`'s."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    return [flag for flag in flags if flag not in parser._option_string_actions]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` of the known word that is nearest; empty where none is near."""
    known = list(known)
    # `--lora_rank` begins as `--lora_r` does, which is nearer than `--local_rank`.
    begins = [other for other in known if len(other) > 5 and word.startswith(other)]
    near = [max(begins, key=len)] if begins else difflib.get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_path(path: str | Path) -> str:
    """`did_you_mean` of a path that is not there, among what lies beside it."""
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [other.name for other in path.parent.iterdir()]).replace(
        "mean ", f"mean {path.parent}/" if path.parent != Path() else "mean "
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def batch_size(text: str) -> int | str:
    """A whole number of at least 1, or `auto`."""
    return "auto" if text == "auto" else positive(text)


def add_answering_flags(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """--batch_size, --max_new_tokens and --engine of every command that asks a model."""
    parser.add_argument(
        "--batch_size",
        type=batch_size,
        default="auto",
        metavar="N",
        help="most questions at once, on each process; auto (the default): what free memory holds",
    )
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens, help="longest answer, in tokens")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="who answers: this project (the default), or vLLM where it is installed (docs/serving.md)",
    )
    parser.add_argument(
        "--base_precision",
        choices=["int8"],
        help="products with the base's weights in INT8, on a GPU of compute capability 9.0; left out: as they are loaded",
    )


def add_accept_changes(parser: argparse.ArgumentParser) -> None:
    """--accept_changes of every command that uses a finished run."""
    parser.add_argument(
        "--accept_changes",
        action="store_true",
        help="use the run although its files, its data or its base changed since its training; the result notes it",
    )


def asking_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every command that loads one model and asks it."""
    parser = Parser(description)
    add = parser.add_argument
    add("--model", required=True, help="a base (folder or Hub name), outputs/<run>, or a merged folder")
    add_answering_flags(parser, max_new_tokens=256)
    add_accept_changes(parser)
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    add("--load_in_4bit", action="store_true", help="quantise the weights: 7B parameters in 5 GB")
    return parser


def evaluation_parser(description: str, *, max_new_tokens: int) -> argparse.ArgumentParser:
    """The flags that every evaluation has."""
    parser = Parser(description)
    add = parser.add_argument
    add("--run", required=True, help="folder of a finished training, such as outputs/llava-sample")
    add("--dataset", help="folder or Hub dataset; left out: the one that the run was trained on")
    add("--split", default="test", help="split to ask about (default %(default)s)")
    add("--task", choices=TASK_NAMES, help="what the rows are; left out: as in training")
    add("--language", choices=LANGUAGES, default="en", help="of the verdict and the page (default %(default)s)")
    add_answering_flags(parser, max_new_tokens=max_new_tokens)
    add("--limit", type=positive, help="ask only so many questions, evenly spaced over the split")
    add_accept_changes(parser)
    add("--overwrite", action="store_true", help="evaluate anew; the old evaluation is kept beside it")
    return parser
