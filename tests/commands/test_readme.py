"""The READMEs: the same commands in both languages, and every command, flag and file that they name exists."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH = [page for page in PAGES if not page.name.endswith(".ko.md")]


def korean(page):
    return page.with_name(page.name.removesuffix(".md") + ".ko.md")


def commands(page) -> list[list[str]]:
    """Words of every command in the page's bash blocks, comments left out, continued lines joined."""
    found, unfinished = [], ""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(unfinished + line, comments=True)
            except ValueError:  # a quoted text goes on in the next line
                unfinished += line + "\n"
                continue
            unfinished = ""
            found += [words] if words else []
    return found


def test_the_commands_are_found():
    assert sum(len(commands(page)) for page in ENGLISH) > 20


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_both_languages_give_the_same_commands(page):
    def without_words(words):  # questions to a model are in the language of the page
        return [word if not re.search(r"[^\x00-\x7f]|[?.!]$", word) else "..." for word in words]

    assert list(map(without_words, commands(page))) == list(map(without_words, commands(korean(page))))


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_both_languages_have_the_same_sections_tables_and_figures(page):
    texts = [path.read_text(encoding="utf-8") for path in (page, korean(page))]
    shapes = [re.findall(r"^(#+) |^(\|)|^(- )", text, re.M) for text in texts]
    assert shapes[0] == shapes[1]
    tables = ["\n".join(re.findall(r"^\|.*", text, re.M)) for text in texts]
    figures = [sorted(re.findall(r"\d+(?:[.,]\d+)+", table)) for table in tables]
    assert figures[0] == figures[1]


@cache
def help_of(script: str) -> str:
    """What the command prints; in this process, which has read torch and its like once."""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend((ROOT / script).parent)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code in (0, None)
    return written.getvalue()


SCRIPT = re.compile(r"(?:scripts|data_prep|benchmarks)/\w+\.py$")
COMMANDS = [words for page in [*ENGLISH, ROOT / "benchmarks" / "README.md"] for words in commands(page)]
OURS = sorted({word for words in COMMANDS for word in words if SCRIPT.match(word)})


@pytest.mark.parametrize("script", OURS)
def test_every_flag_of_a_command_exists(script):
    assert (ROOT / script).is_file()
    flags = {
        word.split("=")[0]
        for words in COMMANDS
        if script in words and "slurm/chain.sh" not in words  # a chain carries the words of several commands
        for word in words[words.index(script) + 1 :]
        if word.startswith("--")
    }
    unknown = [flag for flag in flags - {"--config"} if not re.search(rf"{re.escape(flag)}\b", help_of(script))]
    assert not unknown


def test_every_file_and_target_that_a_command_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in COMMANDS:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words
        for word in words:
            if re.match(r"(?:scripts|accelerate_configs|slurm|benchmarks|tests)/[\w/.-]+\.\w+$", word):
                assert (ROOT / word).exists(), words
