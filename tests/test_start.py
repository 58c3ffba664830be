"""What goes on beside the imports of a command, and what it tells of its start."""

import os
import subprocess
import sys
from multiprocessing import Pipe

import pytest

from finetuning import fingerprints, start
from support.fork_server import ROOT


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    """A folder with the files of a model, large enough to be hashed ahead."""
    monkeypatch.setattr(fingerprints, "WORTH_A_PROCESS", 1)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name * 1000, encoding="utf-8")
    return tmp_path


def test_a_model_hashed_ahead_has_the_same_fingerprint_and_is_read_anew_the_next_time(model_folder):
    expected = fingerprints.of_folder(model_folder, fingerprints.MODEL_FILES)
    fingerprints.hash_ahead(str(model_folder))
    assert model_folder in fingerprints._ahead
    assert fingerprints.of_model(str(model_folder)) == expected
    (model_folder / "config.json").write_text("changed", encoding="utf-8")
    assert fingerprints.of_model(str(model_folder)) != expected


def test_a_model_is_hashed_here_where_the_process_that_hashed_ahead_was_killed(model_folder):
    receiver, sender = Pipe(duplex=False)
    sender.close()
    fingerprints._ahead[model_folder] = receiver
    assert fingerprints.of_model(str(model_folder)) == fingerprints.of_folder(model_folder, fingerprints.MODEL_FILES)


def test_a_small_model_and_one_of_the_hub_start_no_process(model_folder, monkeypatch):
    monkeypatch.undo()
    for name in (str(model_folder), "llava-hf/llava-1.5-7b-hf"):
        fingerprints.hash_ahead(name)
    assert fingerprints._ahead == {}
    assert fingerprints.of_model("llava-hf/llava-1.5-7b-hf") is None


def test_the_start_is_told_once_by_parts_and_only_of_commands_that_noted_their_imports(monkeypatch):
    monkeypatch.setattr(start, "_ended", {})
    start.ended("first step")
    assert start.told() == ""
    monkeypatch.setattr(start, "_ended", {"imports": 9.0, "weights": 13.25, "first step": 20.0})
    assert start.told() == "20.0 s from the command to its first step: imports 9.0, weights 4.2, first step 6.8"
    assert start.told() == ""


@pytest.mark.slow
def test_bitsandbytes_comes_without_the_compiler_and_switch_and_garbage_collector_are_as_they_were():
    code = (
        "import gc, os, sys; sys.path.insert(0, 'scripts'); from finetuning import start; start.prepare(); "
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, gc.isenabled()); "
        "start.imported(); print(os.environ[start.COMPILER_OFF], gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    environment = os.environ | {start.COMPILER_OFF: "0"}
    words = [sys.executable, "-c", code]
    printed = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-6:] == ["True", "False", "False", "0", "True", "True"]
