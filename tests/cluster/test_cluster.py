"""The job files on a real Slurm of two nodes: signals, kills, preemption, sweep, chain. Run by `make test-cluster`."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from wandb_files import read_attempts

from finetuning.preemption import checkpoint_problems

CLUSTER = ROOT / "tests" / "cluster" / "cluster.sh"
missing = subprocess.run([CLUSTER, "missing"], capture_output=True, text=True, check=True).stdout.strip()
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no Slurm cluster can be started here: {missing}")

PATIENCE = 900  # seconds: a job may take long on a busy machine, and no test measures how long
TRAIN = ("slurm/train.slurm", "scripts/train_llava.py")
SECRET = "hf_secretsecretsecretsecretsecret"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the daemons' sockets are below it
    subprocess.run([CLUSTER, "start", folder], check=True)
    os.environ |= {
        "SLURM_CONF": str(folder / "slurm.conf"), "WANDB_MODE": "offline", "HF_TOKEN": SECRET, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def recipe(tiny_llava, cctv_dataset, tmp_path_factory) -> Path:
    """The sample's recipe, on the tiny model and dataset of the tests: 40 steps, a checkpoint every fifth."""
    values = yaml.safe_load((ROOT / "scripts/configs/llava_sample.yaml").read_text())
    values |= {
        "model_name_or_path": str(tiny_llava), "dataset_name": str(cctv_dataset), "max_steps": 40, "lora_dropout": 0.1,
        "per_device_train_batch_size": 1, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 5,
        "logging_steps": 1, "output_dir": str(tmp_path_factory.mktemp("outputs") / "run"),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def submit(*words: object, **environment: str) -> str:
    result = run("slurm/submit.sh", "--parsable", *words, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def states(job: str) -> set[str]:
    """Of a job, or of all elements of an array."""
    return set(run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.split())


def log_of(job: str) -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "slurm" / "logs").glob(f"*-{job}*.log")))


def wait_until(condition: Callable[[], object], what: str, pause: float = 0.02) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(pause)


def wait_for(job: str, wanted: str) -> None:
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", wanted}
    wait_until(lambda: states(job) <= over, f"job {job} {wanted}", pause=0.3)
    assert states(job) == {wanted}, log_of(job)


def start_again(job: str) -> None:
    """Slurm lets a job that was queued again wait for two minutes; the tests do not."""
    wait_for(job, "PENDING")
    time.sleep(2)  # a start in the second of the stop fails
    assert run("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0


def progress_of(folder: Path) -> dict:
    path = folder / "progress.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def wait_for_step(folder: Path, job: str, step: int, attempts: int) -> None:
    polls = itertools.count(1)

    def reached() -> bool:
        if next(polls) % 100 == 0:  # a job that has ended will not get there
            assert states(job) <= {"PENDING", "RUNNING", "CONFIGURING"}, log_of(job)
        progress = progress_of(folder)
        return len(progress.get("attempts", [])) == attempts and progress.get("step", 0) >= step

    wait_until(reached, f"step {step} of job {job}")


def training_processes(job: str, node: str) -> list[int]:
    """Launcher and ranks of a job on one node, by the environment that Slurm gave them."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or not ours to read
            continue
        if wanted <= environment and b"python" in command[0] and TRAIN[1].encode() in command:
            found.append(int(folder.name))
    return found


def test_killed_warned_and_preempted_a_run_ends_with_the_weights_of_an_undisturbed_one(recipe, tmp_path):
    two_by_two = {"PROCESSES_PER_NODE": "2"}
    words = ("--nodes=2", *TRAIN, "ddp", recipe, "--output_dir")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    job = submit(*words, undisturbed, **two_by_two)
    wait_for(job, "COMPLETED")
    assert "Nodes checked: 2, 2 processes each; they reach each other" in log_of(job)
    two_by_two["CHECK_NODES"] = "no"

    # 1. All processes of node 2 are killed in the middle of a checkpoint: the job fails, a whole checkpoint is left.
    job = submit(*words, disturbed, **two_by_two)
    wait_for_step(disturbed, job, 6, attempts=1)
    processes = training_processes(job, "ftnode2")
    assert len(processes) == 3  # the launcher and two ranks
    while True:
        wait_until(lambda: list(disturbed.glob("unfinished/checkpoint-*")), "a checkpoint being written")
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        time.sleep(0.3)
        if list(disturbed.glob("unfinished/checkpoint-*")):
            break  # held up half way: no process may go on before all have written
        for process in processes:
            os.kill(process, signal.SIGCONT)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    wait_for(job, "FAILED")
    assert "the last checkpoint goes on with: slurm/submit.sh --nodes=2 slurm/train.slurm" in log_of(job)
    checkpoints = sorted(disturbed.glob("checkpoint-*"))
    assert checkpoints and all(checkpoint_problems(path) == [] for path in checkpoints)
    assert list(disturbed.glob("unfinished/checkpoint-*"))

    # 2. A job that may not be queued again is told to stop by hand, and ends with the command that goes on.
    job = submit("--no-requeue", *words, disturbed, **two_by_two)
    wait_for_step(disturbed, job, progress_of(disturbed)["step"] + 1, attempts=2)
    run("scancel", "-s", "USR1", job)
    wait_for(job, "FAILED")
    assert "this job may not be queued again. To go on: slurm/submit.sh --nodes=2" in log_of(job)
    assert "Traceback" not in log_of(job)
    assert "ExitCode=75:0" in run("scontrol", "show", "job", job).stdout

    # 3. Warned as before the time limit (the job's script alone), it queues itself again ...
    job = submit(*words, disturbed, **two_by_two)
    wait_for_step(disturbed, job, progress_of(disturbed)["step"] + 1, attempts=3)
    run("scancel", "--batch", "-s", "USR2", job)
    start_again(job)

    # 4. ... and once more when a job of a higher partition takes its nodes; then it ends.
    wait_for_step(disturbed, job, progress_of(disturbed)["step"] + 1, attempts=4)
    urgent = run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o/dev/null", "--wrap=true"
    ).stdout.strip()
    wait_for(urgent, "COMPLETED")
    start_again(job)
    wait_for(job, "COMPLETED")

    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (undisturbed, disturbed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    attempts = progress_of(disturbed)["attempts"]
    assert [attempt.get("reason", "killed")[:12] for attempt in attempts] == [
        "killed", "SIGUSR1", "SIGUSR2", "SIGTERM", "completed"]  # fmt: skip
    for before, after in itertools.pairwise(attempts[1:]):
        assert after["from_step"] == before["step"]  # after a signal no step is done twice
    told = read_attempts(disturbed)  # to W&B
    assert {attempt["id"] for attempt in told} == {(disturbed / "wandb_run_id.txt").read_text().strip()}
    assert told[-1]["group"] == "train" and {"strategy:ddp", "processes:4", f"job:{job}"} <= set(told[-1]["tags"])
    steps = [[entry["train/global_step"] for entry in attempt["history"] if "train/loss" in entry] for attempt in told]
    assert all(part == sorted(part) for part in steps) and set(itertools.chain(*steps)) == set(range(1, 41))
    assert told[-1]["summary"]["completed"] is True
    files = [path for path in disturbed.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in log_of(job)
    status = run("python", "scripts/status.py", disturbed).stdout
    assert "complete: 40 steps" in status and "restarts: 4" in status


def test_a_sweep_trains_each_point_in_a_folder_and_the_runs_are_a_group(recipe, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("lora_r: [4, 8]\n")
    flags = ("--max_steps", "2", "--save_strategy", "no", "--output_dir", tmp_path / "sweep")
    job = submit("slurm/sweep.slurm", TRAIN[1], "cpu", recipe, grid, *flags, CHECK_NODES="no")
    wait_for(job, "COMPLETED")
    for rank in (4, 8):
        folder = tmp_path / "sweep" / f"lora_r={rank}"
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        (attempt,) = read_attempts(folder)
        assert attempt["group"] == f"array-{job}" and attempt["config"]["lora_r"] == rank


def chain(recipe: Path, raw: Path, folder: Path, *flags: object) -> dict[str, str]:
    """Submit a chain; its jobs by name."""
    training = (TRAIN[1], "cpu", recipe, "--dataset_name", folder / "data", "--output_dir", folder / "run", *flags)
    data = ("--frames", raw / "frames", "--labels", raw / "labels.csv", "--messages", raw / "messages.txt")
    result = run("slurm/chain.sh", *training, "--", *data, "--gap", "3", CHECK_NODES="no")
    assert result.returncode == 0, result.stderr
    return dict(line.split(": job ") for line in result.stdout.splitlines())


def test_a_chain_prepares_trains_evaluates_and_merges(recipe, raw_cctv, tmp_path):
    jobs = chain(recipe, raw_cctv, tmp_path, "--max_steps", "2")
    assert list(jobs) == ["prepare", "train", "evaluate", "merge"]
    for job in jobs.values():
        wait_for(job, "COMPLETED")
    assert (tmp_path / "run" / "evaluation" / "test" / "metrics.json").is_file()
    assert (tmp_path / "run-merged" / "merge_report.json").is_file()


def test_a_chain_stops_when_its_first_job_fails(recipe, tmp_path):
    jobs = chain(recipe, tmp_path / "no-frames-here", tmp_path)
    wait_for(jobs["prepare"], "FAILED")
    for name in ("train", "evaluate", "merge"):
        wait_for(jobs[name], "CANCELLED")
    assert not (tmp_path / "run").exists()


def test_a_wrong_recipe_fails_before_it_is_queued(recipe):
    before = run("squeue", "--noheader", "--states=all", "--format=%i").stdout
    result = run("slurm/submit.sh", "--nodes=2", *TRAIN, "dpd", recipe, "--lora_rank", "4")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "dpd: no strategy" in result.stderr and "--lora_rank" in result.stderr
    assert run("squeue", "--noheader", "--states=all", "--format=%i").stdout == before
