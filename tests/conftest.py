"""What the tests share: a tiny model of each architecture and a small dataset, made once by the project's own commands."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def run_command(*words: str | Path, **kwargs) -> subprocess.CompletedProcess:
    """A command of the project in a process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=600, check=False, **kwargs
    )


def must_run(*words: str | Path) -> str:
    result = run_command(*words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    must_run("scripts/make_tiny_model.py", "--architecture", "llava", "--output", folder)
    return folder


@pytest.fixture(scope="session")
def raw_cctv(tmp_path_factory) -> Path:
    """frames/, labels.csv and messages.txt of 60 drawn frames."""
    folder = tmp_path_factory.mktemp("raw") / "cctv"
    must_run("data_prep/make_sample_cctv.py", "--output", folder, "--frames", "60")
    return folder


@pytest.fixture(scope="session")
def cctv_dataset(tmp_path_factory, raw_cctv) -> Path:
    """The prepared dataset of `raw_cctv`: one question a frame, 3 frames of gap between the splits."""
    folder = tmp_path_factory.mktemp("data") / "cctv"
    must_run(
        *("data_prep/prepare_cctv.py", "--frames", raw_cctv / "frames", "--labels", raw_cctv / "labels.csv"),
        *("--messages", raw_cctv / "messages.txt", "--output", folder, "--gap", "3"),
    )
    return folder


@pytest.fixture(scope="session")
def real_llava_processor() -> Path:
    folder = SHARED / "tokenizers" / "llava-1.5-7b-hf"
    if not folder.is_dir():
        pytest.skip("the real LLaVA-1.5 tokenizer and processor are not on this machine (../shared/data)")
    return folder
