"""The benchmark of training speed, on a CPU with a tiny model: it measures, and both ways learn the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/train_speed.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_both_ways_are_measured_and_learn_the_same(tiny_llava, tmp_path):
    words = ["--steps", 3, "--warmup", 1, "--rounds", 1, "--batch_size", 2, "--workers", 0, "--logging_steps", 1]
    words += ["--learning_rate", 1e-3]
    done = benchmark("--model", tiny_llava, "--output", tmp_path, *words, "--variants", "TRL by hand", "this project")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["variant"] for result in results] == ["TRL by hand", "this project"]
    by_hand, ours = results
    assert by_hand["tokens_a_step"] == ours["tokens_a_step"]
    assert len(ours["losses"]) == 4
    assert len(set(ours["losses"])) == 4
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
