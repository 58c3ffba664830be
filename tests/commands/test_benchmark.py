"""The benchmarks, on a CPU with a tiny model: they measure, both ways learn the same, and drawn crowds are counted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk

from finetuning.data.collator import LlavaDataCollator
from finetuning.models.processing import load_processing_class

ROOT = Path(__file__).parents[2]


def benchmark(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/train_speed.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_both_ways_are_measured_and_learn_the_same(tiny_llava, tmp_path, monkeypatch):
    # The fifth step comes after the last log.
    words = ["--steps", 4, "--warmup", 1, "--rounds", 1, "--batch_size", 2, "--workers", 0, "--logging_steps", 2]
    words += ["--learning_rate", 1e-3]
    done = benchmark("--model", tiny_llava, "--output", tmp_path, *words, "--variants", "TRL by hand", "this project")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["variant"] for result in results] == ["TRL by hand", "this project"]
    by_hand, ours = results
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_speed

    rows = list(train_speed.draw_rows(8, 1, vision=True))
    tokens = LlavaDataCollator(load_processing_class(str(tiny_llava)))(rows)["attention_mask"].sum().item()
    assert by_hand["tokens_a_step"] == ours["tokens_a_step"] == tokens / 4
    assert len(set(ours["losses"])) == len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(by_hand["losses"], rel=1e-3)
    assert "| this project |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "losses.png").stat().st_size > 5000
    again = benchmark("--model", tiny_llava, "--output", tmp_path)
    assert again.returncode != 0
    assert "holds results already" in again.stderr


def test_a_wrong_variant_is_named(tiny_llava, tmp_path):
    done = benchmark("--model", tiny_llava, "--output", tmp_path / "x", "--variants", "fast")
    assert done.returncode != 0
    assert "['fast'] are unknown" in done.stderr
    assert "Traceback" not in done.stderr


def write_program(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def ends_with(tiny_llava, monkeypatch):
    """What train_speed.py says when it ends without results."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_speed

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["train_speed.py", "--model", str(tiny_llava), *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            train_speed.main()
        return ended.value.code

    return run


def test_unsloth_is_asked_for_with_its_python(ends_with, tmp_path):
    words = ("--output", tmp_path / "x", "--variants", "TRL by hand", "Unsloth")
    assert "name its Python with --unsloth PYTHON" in ends_with(*words)
    assert "nowhere/python: no such program" in ends_with(*words, "--unsloth", tmp_path / "nowhere/python")
    without = write_program(tmp_path / "without", "exit 1")
    assert f"--unsloth {without} has no Unsloth: {without} -m pip install unsloth" in ends_with(
        *words, "--unsloth", without
    )
    assert not (tmp_path / "x").exists()


def test_unsloth_gets_the_same_tokens_and_its_last_words_are_shown(ends_with, tiny_llava, tmp_path):
    got = tmp_path / "got"
    python = write_program(
        tmp_path / "python", f'[ "$1" = -c ] && exit 0; cp -r "$2" {got}; echo step; echo "here it broke"; exit 3'
    )
    words = ["--steps", 1, "--warmup", 1, "--batch_size", 2, "--variants", "Unsloth, NF4", "--unsloth", python]
    assert ends_with("--output", tmp_path / "output", *words).endswith(f"{python} ended with 3:\nhere it broke\n")
    rows = load_from_disk(got / "rows")
    order = json.loads((got / "order.json").read_text())
    assert order["nf4"] and order["arguments"]["max_steps"] == 2 and len(rows) == 4
    processor = load_processing_class(str(tiny_llava))
    batch = LlavaDataCollator(processor)(list(rows))
    for index, row in enumerate(rows):
        supervised = [label for label in row["labels"] if label != -100]
        assert processor.tokenizer.decode(supervised) == row["messages"][1]["content"] + "</s>"
        assert batch["input_ids"][index, : len(row["input_ids"])].tolist() == row["input_ids"]
        assert batch["labels"][index, : len(row["labels"])].tolist() == row["labels"]
    assert (got / "model" / "model.safetensors").is_file() and (got / "model" / "processor_config.json").is_file()


def test_unsloth_learns_the_same(tiny_llava, tmp_path):
    python = os.environ.get("UNSLOTH_PYTHON")
    if python is None or shutil.which(python) is None:
        pytest.skip("needs a GPU, and UNSLOTH_PYTHON: the Python of an environment in which Unsloth is installed")
    words = ["--steps", 3, "--warmup", 1, "--rounds", 1, "--batch_size", 2, "--workers", 0, "--logging_steps", 1]
    words += ["--learning_rate", 1e-3, "--unsloth", python, "--variants", "TRL by hand", "Unsloth"]
    done = benchmark("--model", tiny_llava, "--output", tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    by_hand, by_unsloth = json.loads((tmp_path / "results.json").read_text())["results"]
    assert by_unsloth["losses"] == pytest.approx(by_hand["losses"], rel=1e-2)
    for name in ("tokens_a_step", "trained_parameters", "trained_types"):
        assert by_unsloth[name] == by_hand[name]


def test_the_grid_measures_settings_that_were_divided_before(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import memory_grid

    settings = [*memory_grid.llava_settings(), *memory_grid.text_settings()]
    assert len({setting for setting in settings if setting.half == "held out"}) >= 30
    assert settings == [*memory_grid.llava_settings(), *memory_grid.text_settings()]
    output = tmp_path / "grid.jsonl"
    words = ["--model", str(tiny_llava), "--output", str(output), "--every", "40", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["memory_grid.py", *words])
    memory_grid.main()
    _, measured = map(json.loads, output.read_text().splitlines())
    assert measured["half"] == "calibration"
    assert measured["batch"]["rows"] == measured["batch_size"] * (1 if measured["shared"] else measured["questions"])
    assert measured["median_seconds"] > 0
    with pytest.raises(SystemExit, match="is there already"):
        memory_grid.main()


def test_messages_of_a_step_are_counted_and_those_that_the_gpu_waits_for(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from messages import summarise

    def kernel(name: str, start: float, stop: float) -> dict:
        return {"cat": "kernel", "name": name, "ts": start, "dur": stop - start}

    def message(name: str, sent: int, received: int, dtype: str) -> dict:
        args = {
            "Collective name": name,
            "In msg nelems": sent,
            "Out msg nelems": received,
            "dtype": dtype,
            "Group size": 4,
        }
        return {"name": "record_param_comms", "args": args}

    kernels = [kernel("gemm", 0, 4000), kernel("ncclDevKernel_AllReduce", 3000, 6000), kernel("gemm", 5500, 9000)]
    sent = [message("allreduce", 1000, 1000, "Float"), message("_allgather_base", 500, 2000, "BFloat16")]
    sent.append(message("barrier", 1, 1, "Float"))
    # A ring of 4 sends 2 x 3/4 of 4,000 bytes, and 3/4 of the 4,000 that each has in the end.
    assert summarise(kernels + sent) == {
        "bytes_sent": 9000,
        "step_ms": 9.0,
        "message_ms": 3.0,
        "waiting_ms": 1.5,
        "idle_ms": 0.0,
    }
    nothing = dict.fromkeys(["bytes_sent", "step_ms", "message_ms", "waiting_ms", "idle_ms"])
    assert summarise([]) == nothing
