"""The READMEs: the same commands in both languages, and every command, flag and file that they name exists."""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

FOLDERS = [ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "findings", ROOT / "scripts"]
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))
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


def test_the_pages_and_commands_are_found():
    assert len(ENGLISH) >= 14
    assert sum(len(commands(page)) for page in ENGLISH) > 30


def test_every_page_has_both_languages():
    assert {korean(page) for page in ENGLISH} == set(PAGES) - set(ENGLISH)


def sentences(text: str) -> list[str]:
    """Sentences of running text: without code, tables, headings, links' addresses and pictures."""
    text = re.sub(r"```.*?```|^\|.*?$|^#.*?$|!\[.*?\]\(.*?\)", "", text, flags=re.S | re.M)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
    parts = re.split(r"(?<=[.:!?])\s+|\n\n|\n- |\n\d\. ", text)
    return [part for part in parts if len(part.split()) > 2]


def test_the_readme_is_one_screenful_in_short_sentences():
    for page in (ROOT / "README.md", ROOT / "README.ko.md"):
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 160
    found = sentences((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) > 30
    assert sum(len(sentence.split()) for sentence in found) / len(found) <= 16


def listed_files(tree: str) -> list[str]:
    """Paths in a tree of the architecture page, as `scripts/finetuning/data/pictures.py`; each has a phrase."""
    above, folder, listed = "", "", []
    for line in tree.splitlines():
        indent, name, *phrase = len(line) - len(line.lstrip()), *line.split(maxsplit=1)
        if indent == 0:
            above, folder = name, ""
        elif indent == 2:
            folder = name
            listed += [above + name] * bool(phrase)
        else:
            assert phrase, line
            listed.append(above + folder + name)
    return listed


@pytest.mark.parametrize("name", ["architecture.md", "architecture.ko.md"])
def test_the_trees_of_the_architecture_name_every_file(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    trees = re.findall(r"```\n(scripts/.*?)```", text, re.S)
    listed = [path for tree in trees for path in listed_files(tree)]
    folders = {path for path in listed if path.endswith("/")}
    tracked = subprocess.run(
        ["git", "ls-files", "scripts", "data_prep", "slurm", "benchmarks"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    files = {
        path
        for path in tracked.stdout.split()
        if (path.endswith((".py", ".sh", ".slurm", ".yaml")) and not path.endswith("__init__.py")) or path in listed
    }
    files = {
        path for path in files if (ROOT / path).is_file() and not any(path.startswith(folder) for folder in folders)
    }
    assert len(listed) == len(set(listed)) and set(listed) - folders == files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_languages_give_the_same_commands(page):
    def without_words(words):  # questions to a model are in the language of the page
        return [word if not re.search(r"[^\x00-\x7f]|[?.!]$", word) else "..." for word in words]

    assert list(map(without_words, commands(page))) == list(map(without_words, commands(korean(page))))


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: str(page.relative_to(ROOT)))
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
COMMANDS = [words for page in ENGLISH for words in commands(page)]
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


LAUNCHED = [
    *PAGES,
    *(ROOT / "notebooks").glob("*.ipynb"),
    *(path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")),
    *(path for path in (ROOT / "slurm").iterdir() if path.is_file()),
]
LAUNCH = re.compile(r"accelerate launch ((?:(?!accelerate launch)[^\n`])*?)[\w/]+\.py\b")


def test_every_launch_names_a_file_of_accelerate_configs():
    """Without one `accelerate` warns of the settings that it chose, or reads those of somebody's home folder."""
    found = 0
    for path in LAUNCHED:
        text = path.read_text(encoding="utf-8")
        for launch in LAUNCH.findall(text.replace("\\\\\\n", " ").replace("\\\n", " ")):
            if not launch.startswith(("... ", "$", "--config_file $", "--config_file accelerate_configs/{")):
                found += 1
                named = re.search(r"--config_file (accelerate_configs/\w+\.yaml) ", launch)
                assert named and (ROOT / named[1]).is_file(), (path, launch)
    assert found > 30
