"""What the tests share: a tiny model of each architecture and a small dataset, made once by the project's own commands."""

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from support.switched_off import without

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

# Files of tests that take minutes, the longest first.
LONG = ["test_strategies.py", "test_tracking.py", "test_benchmark.py", "test_upstream.py"]
# What tests are slow by: these fixtures start commands or build a dataset by them.
SLOW_FIXTURES = {"raw_cctv", "cctv_dataset", "costs"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` deals the files out to two processes: neither should get a long one last.

    `make test-fast` leaves out what launches a command, trains, or is marked slow where it stands.
    """
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        runs_commands = item.path.parent.name == "commands" or item.path.name in LONG[:3]
        if runs_commands or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without",
        metavar="ENTRIES",
        help="switch off these of upstream.ENTRIES, such as Trainer.log: their proofs (support/proofs.py) then fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before any test's file is imported, because some names are replaced by an import."""
    if words := config.getoption("--without"):
        off = without(*words.split(","))
        off.__enter__()
        config.add_cleanup(lambda: off.__exit__(None, None, None))


def run_command(*words: str | Path, **kwargs) -> subprocess.CompletedProcess:
    """A command of the project in a process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=600, check=False, **kwargs
    )


def run_here(command: str, *words: str | Path) -> subprocess.CompletedProcess:
    """`run_command` without the ten seconds in which a new process imports PyTorch and its libraries.

    The file runs as `__main__`, in this process. What would be a stack trace there is an error of the test here.
    """
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", [command, *map(str, words)])
        try:
            runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            code = end.code
    if isinstance(code, str):  # as Python does at its end
        print(code, file=err)
        code = 1
    return subprocess.CompletedProcess(sys.argv, code or 0, out.getvalue(), err.getvalue())


def must_run(*words: str | Path, by=run_here) -> str:
    result = by(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    must_run("scripts/make_tiny_model.py", "--architecture", "llava", "--output", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    must_run("scripts/make_tiny_model.py", "--architecture", "gemma", "--output", folder)
    return folder


@pytest.fixture(scope="session")
def raw_cctv(tmp_path_factory) -> Path:
    """frames/, labels.csv and messages.txt of 60 drawn frames."""
    folder = tmp_path_factory.mktemp("raw") / "cctv"
    must_run("data_prep/make_sample_cctv.py", "--output", folder, "--frames", "60", by=run_command)
    return folder


@pytest.fixture(scope="session")
def cctv_dataset(tmp_path_factory, raw_cctv) -> Path:
    """The prepared dataset of `raw_cctv`: one question a frame, 3 frames of gap between the splits."""
    folder = tmp_path_factory.mktemp("data") / "cctv"
    must_run(
        *("data_prep/prepare_cctv.py", "--frames", raw_cctv / "frames", "--labels", raw_cctv / "labels.csv"),
        *("--messages", raw_cctv / "messages.txt", "--output", folder, "--gap", "3"),
        by=run_command,
    )
    return folder


@pytest.fixture(scope="session")
def real_llava_processor() -> Path:
    folder = SHARED / "tokenizers" / "llava-1.5-7b-hf"
    if not folder.is_dir():
        pytest.skip("the real LLaVA-1.5 tokenizer and processor are not on this machine (../shared/data)")
    return folder
