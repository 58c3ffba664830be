"""What status.py says of runs in every state."""

import datetime
import json
import os
import subprocess
import sys

from conftest import run_command

from finetuning.run_folder import begin_attempt, end_attempt


def minutes_ago(minutes: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)).isoformat()


def test_a_run_tells_step_speed_time_left_losses_restarts_page_and_that_it_fell_silent(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-80").mkdir(parents=True)
    (run / "checkpoint-100").mkdir()
    progress = {
        "step": 120, "max_steps": 1000, "logged_at": minutes_ago(120.5), "seconds_per_step": 4.5, "samples_per_second": 3.55,
        "loss": 0.51234, "eval_loss": 0.61, "scores": {"off by (people)": 2.25}, "wandb": "https://wandb.ai/me/project/runs/1a2b3c4d",
        "attempts": [
            {"started": minutes_ago(90), "from_step": 0, "host": "node1", "process": 1, "ended": minutes_ago(50),
             "step": 90, "reason": "SIGUSR2"},
            {"started": minutes_ago(125), "from_step": 90, "host": "node1", "process": 2},
        ],
    }  # fmt: skip
    (run / "progress.json").write_text(json.dumps(progress))
    lines = run_command("scripts/status.py", run).stdout.splitlines()
    assert lines[:6] == [
        str(run),
        "  step: 120 of 1,000 (12%), 1 h 06 min left while it runs",
        "  speed: 4.50 s a step, 3.5 rows/s",
        "  last losses: train 0.5123, validation 0.6100, off by (people) 2.2500, logged 2 h 00 min ago",
        "  last checkpoint: step 100",
        "  restarts: 1",
    ]
    assert lines[6].startswith("    at step 90, ") and lines[6].endswith(": SIGUSR2")
    assert lines[7] == "  nothing was logged for 2 h 00 min: look at its output"
    assert lines[8:] == ["  W&B: https://wandb.ai/me/project/runs/1a2b3c4d"]


def test_a_stopped_and_a_finished_run(tmp_path):
    begin_attempt(tmp_path, 0)
    end_attempt(tmp_path, 7, "SIGTERM")
    assert (
        "stopped at step 7 by SIGTERM; the same command continues" in run_command("scripts/status.py", tmp_path).stdout
    )
    begin_attempt(tmp_path, 7)
    end_attempt(tmp_path, 9, "completed")
    (tmp_path / "metrics.json").write_text('{"completed": true}')
    assert "complete: 9 steps" in run_command("scripts/status.py", tmp_path).stdout


def test_a_run_of_this_machine_is_known_to_run_or_to_be_killed(tmp_path):
    begin_attempt(tmp_path, 0)  # by this very process
    assert f"running: process {os.getpid()} on this machine" in run_command("scripts/status.py", tmp_path).stdout
    progress = json.loads((tmp_path / "progress.json").read_text())
    progress |= {"step": 5, "max_steps": 10, "logged_at": minutes_ago(1), "seconds_per_step": 60}
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, started in ((ended.pid, minutes_ago(0)), (os.getpid(), minutes_ago(60 * 24 * 365))):  # gone; reused
        progress["attempts"][0] |= {"process": process, "started": started}
        (tmp_path / "progress.json").write_text(json.dumps(progress))
        said = run_command("scripts/status.py", tmp_path).stdout
        assert f"not running: its process {process} on this machine ended without a word" in said
        assert "5 of 10 (50%)\n" in said  # and no time left


def test_a_job_that_slurm_has_ended_does_not_run(tmp_path, monkeypatch):
    begin_attempt(tmp_path, 0)
    progress = json.loads((tmp_path / "progress.json").read_text())
    progress["attempts"][0] |= {"job": "7", "host": "node9"}
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for state, runs in (("RUNNING node9 None", True), ("PENDING  (Resources)", True), ("NODE_FAIL  None", False)):
        squeue.write_text(f"#!/bin/sh\necho '{state}'\n")
        squeue.chmod(0o755)
        said = run_command("scripts/status.py", tmp_path).stdout
        assert ("not running: its job" not in said) == runs


def test_of_several_names_those_that_are_no_run_are_passed_over(tmp_path):
    (tmp_path / "run").mkdir()
    begin_attempt(tmp_path / "run", 0)
    (tmp_path / "merged").mkdir()
    (tmp_path / "answers.jsonl").touch()
    result = run_command("scripts/status.py", *sorted(tmp_path.iterdir()))
    assert result.returncode == 0 and "step: none logged yet" in result.stdout
    assert f"Passed over, no runs: {tmp_path / 'answers.jsonl'}, {tmp_path / 'merged'}\n" in result.stdout


def test_a_folder_without_a_run_is_named_after_the_others_were_shown(tmp_path):
    begin_attempt(tmp_path, 0)
    result = run_command("scripts/status.py", tmp_path / "none", tmp_path)
    assert result.returncode == 1 and str(tmp_path) in result.stdout
    assert f"{tmp_path / 'none'}: no run here" in result.stderr and "Traceback" not in result.stderr


def test_a_run_is_shown_beside_its_plan(tmp_path):
    begin_attempt(tmp_path, 0)
    progress = json.loads((tmp_path / "progress.json").read_text())
    planned = {"seconds_per_step": 0.5, "peak_memory_gib": 20.0, "seconds": 500, "samples_per_step": 8}
    for speed, said in ((15.5, "(+3%)"), (12.0, "more than 10% off")):
        now = {
            "step": 10,
            "max_steps": 1000,
            "logged_at": minutes_ago(1),
            "samples_per_second": speed,
            "peak_memory_gib": 20.2,
        }
        (tmp_path / "progress.json").write_text(json.dumps(progress | {"planned": planned} | now))
        shown = run_command("scripts/status.py", tmp_path).stdout
        assert (
            "planned: 0.50 s a step, measured" in shown and said in shown and "20.00 GiB, measured 20.20 (+1%)" in shown
        )
