"""The benchmark of answering runs on a CPU, asks both ways the same, and writes what it measured."""

import json

import pytest
from conftest import ROOT, must_run, run_here


@pytest.mark.parametrize(
    ("kind", "ways"),
    [("llava", ["transformers", "all counts", "this project"]), ("gemma", ["transformers", "this project"])],
)
def test_all_ways_are_measured_and_answer_the_same(kind, ways, request, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where Python looks first when the file is run as a command
    output = tmp_path / "results"
    flags = ["--images", "3", "--rounds", "1", "--max_new_tokens", "4", "--batch_size", "2", "--output", output]
    flags += ["--ways", "transformers", "counts"] if "all counts" in ways else []
    printed = must_run("benchmarks/answer_speed.py", "--model", request.getfixturevalue(f"tiny_{kind}"), *flags)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]
    assert [result["way"] for result in results] == [*ways, "this project"]
    assert all(result["seconds"] > 0 and 0 < result["share_of_peak"] < 1 for result in results[:-1])
    assert set(results[-1]["stages"]) == {"see", "prefill", "decode", "waiting for pictures and the rest"}
    assert "| this project |" in printed and "| 3 of 3 |" in printed
    assert (output / "report.md").read_text(encoding="utf-8") in printed and (output / "answers.png").is_file()
    again = run_here("benchmarks/answer_speed.py", "--model", request.getfixturevalue(f"tiny_{kind}"), *flags)
    assert again.returncode == 1 and "holds results already" in again.stderr
