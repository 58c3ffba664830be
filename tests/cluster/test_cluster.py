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
from conftest import ROOT, must_run
from safetensors.torch import load_file

from finetuning.training.checkpoints import checkpoint_problems
from support.wandb_files import read_attempts

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
        "PYTHONPATH": str(ROOT / "tests" / "support" / "on_cpu"),
    }  # fmt: skip
    yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def recipe(tiny_llava, cctv_dataset, tmp_path_factory) -> Path:
    """The sample's recipe, on the tiny model and dataset of the tests: 30 steps, a checkpoint every fifth.

    Left alone, DDP fills its buckets anew after the first step of each start; more than two processes then add up in
    another order, and a restart ends 1e-6 elsewhere.
    """
    values = yaml.safe_load((ROOT / "scripts/configs/llava_sample.yaml").read_text())
    values |= {
        "model_name_or_path": str(tiny_llava), "dataset_name": str(cctv_dataset), "max_steps": 30, "lora_dropout": 0.1,
        "per_device_train_batch_size": 1, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 5,
        "logging_steps": 1, "ddp_find_unused_parameters": True, "output_dir": str(tmp_path_factory.mktemp("outputs") / "run"),
    }  # fmt: skip
    del values["num_train_epochs"]  # both would say how long to train
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


def submit(*words: object, by: str = "slurm/submit.sh", **environment: str) -> str:
    """Queue a job; its id. `by="sbatch"` where the check of the recipe, which takes seconds, has nothing new to see."""
    result = run(by, "--parsable", *words, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def states(job: str) -> set[str]:
    """Of a job, or of all elements of an array."""
    return set(run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout.split())


def log_of(job: str) -> str:
    paths = itertools.chain.from_iterable((ROOT / "slurm/logs").glob(f"*-{job}{end}.log") for end in ("", "_*"))
    return "\n".join(path.read_text() for path in sorted(paths))


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


def chain(recipe: Path, raw: Path, folder: Path) -> dict[str, str]:
    """Submit a chain; its jobs by name."""
    flags = ("--dataset_name", folder / "data", "--output_dir", folder / "run")
    data = ("--frames", raw / "frames", "--labels", raw / "labels.csv", "--messages", raw / "messages.txt")
    places = {"PREPARE_OPTIONS": "--nodelist=ftnode2", "TRAIN_OPTIONS": "--nodelist=ftnode1", "CHECK_NODES": "no"}
    result = run("slurm/chain.sh", TRAIN[1], "cpu", recipe, *flags, "--", *data, "--gap", "3", **places)
    assert result.returncode == 0, result.stderr
    return dict(line.split(": job ") for line in result.stdout.splitlines())


@pytest.fixture(scope="module")
def small_jobs(recipe, raw_cctv, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Jobs of one process, queued before all others, since one of them leaves a core idle: their folder, ids by name.

    Node 1 is left to the training of the chain, which is to be preempted.
    """
    folder = tmp_path_factory.mktemp("small-jobs")
    (folder / "grid.yaml").write_text("lora_r: [4, 8]\n")
    node_2 = ("--nodelist=ftnode2", "--nodes=1")
    flags = ("--max_steps", "2", "--save_strategy", "no", "--output_dir", folder / "sweep")
    sweep = ("slurm/sweep.slurm", TRAIN[1], "cpu", recipe, folder / "grid.yaml", *flags)
    jobs = {"sweep": submit(*node_2, *sweep, CHECK_NODES="no")}
    warned = ("--no-requeue", "--job-name=warned", *TRAIN, "cpu", recipe, "--output_dir", folder / "warned")
    jobs["warned"] = submit(*node_2, *warned, "--max_steps", "1000", CHECK_NODES="no")
    wait_until(lambda: f"job {jobs['warned']}, restart 0" in log_of(jobs["warned"]), "the job's script runs")
    run("scancel", "--batch", "-s", "USR2", jobs["warned"])  # as Slurm does before the time limit; Python is not up yet
    jobs |= {f"hopeless {name}": job for name, job in chain(recipe, folder / "no-frames", folder / "hopeless").items()}
    jobs |= chain(recipe, raw_cctv, folder / "chain")
    return folder, jobs


def test_a_training_that_is_preempted_is_queued_again_and_keeps_its_chain(small_jobs):
    folder, jobs = small_jobs
    wait_for_step(folder / "chain" / "run", jobs["train"], 1, attempts=1)
    # Held up, or it could end before the next round of the scheduler; Slurm's notice of a preemption is CONT, then TERM.
    os.kill(progress_of(folder / "chain" / "run")["attempts"][0]["process"], signal.SIGSTOP)
    urgent = ("--partition=urgent", "--nodelist=ftnode1", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for(submit(*urgent, by="sbatch"), "COMPLETED")
    start_again(jobs["train"])
    assert states(jobs["evaluate"]) == {"PENDING"}


def test_a_wrong_recipe_fails_before_it_is_queued(recipe):
    def queued() -> set[str]:
        return set(run("squeue", "--noheader", "--states=all", "--format=%F").stdout.split())

    before = queued()
    result = run("slurm/submit.sh", "--nodes=2", *TRAIN, "dpd", recipe, "--lora_rank", "4")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "dpd: no strategy" in result.stderr and "--lora_rank" in result.stderr
    assert queued() == before


def test_killed_and_stopped_a_run_ends_with_the_weights_of_an_undisturbed_one(recipe, tmp_path):
    words = ("--nodes=2", *TRAIN, "ddp", recipe, "--output_dir")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    job = submit(*words, undisturbed, by="sbatch", PROCESSES_PER_NODE="2")
    wait_for(job, "COMPLETED")
    assert "Nodes checked: 2, 2 processes each; they reach each other" in log_of(job)

    # 1. All processes of node 2 are killed in the middle of a checkpoint: the job fails, a whole checkpoint is left.
    again = {"by": "sbatch", "CHECK_NODES": "no", "PROCESSES_PER_NODE": "2"}
    job = submit(*words, disturbed, **again)
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

    # 2. Told to stop by a signal to all its processes, it saves, queues itself again, and goes on to its end.
    job = submit(*words, disturbed, **again)
    wait_for_step(disturbed, job, progress_of(disturbed)["step"] + 1, attempts=2)
    run("scancel", "-s", "USR1", job)
    start_again(job)
    wait_for(job, "COMPLETED")
    # No stack trace of ours; torchrun's own launchers may print one when the first of them leaves.
    assert f'{TRAIN[1]}", line' not in log_of(job)

    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (undisturbed, disturbed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    attempts = progress_of(disturbed)["attempts"]
    ended = [attempt.get("reason", "without a word") for attempt in attempts]
    assert ended == ["without a word", "SIGUSR1", "completed"]
    assert attempts[2]["from_step"] == attempts[1]["step"]  # after a signal no step is done twice
    # What W&B was told. What its process had not yet written when it was killed is missing; those steps came again.
    told = [attempt for attempt in read_attempts(disturbed) if "id" in attempt]
    assert {attempt["id"] for attempt in told} == {(disturbed / "wandb_run_id.txt").read_text().strip()}
    assert told[-1]["group"] == "train" and {"strategy:ddp", "processes:4", f"job:{job}"} <= set(told[-1]["tags"])
    steps = [[entry["train/global_step"] for entry in attempt["history"] if "train/loss" in entry] for attempt in told]
    assert all(part == sorted(part) for part in steps)
    assert set(itertools.chain(*steps)) >= set(range(attempts[1]["from_step"] + 1, 31))
    assert told[-1]["summary"]["completed"] is True
    files = [path for path in disturbed.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in log_of(job)
    status = must_run("scripts/status.py", disturbed)
    assert "complete: 30 steps" in status and "restarts: 2" in status
    assert f"W&B: wandb sync {disturbed}/wandb/offline-run-*" in status


def test_the_chain_trains_evaluates_and_merges(small_jobs):
    folder, jobs = small_jobs
    for name in ("prepare", "train", "evaluate", "merge"):
        wait_for(jobs[name], "COMPLETED")
    attempts = progress_of(folder / "chain" / "run")["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["SIGTERM", "completed"]
    assert attempts[1]["from_step"] == attempts[0]["step"]
    assert (folder / "chain" / "run" / "evaluation" / "test" / "metrics.json").is_file()
    assert (folder / "chain" / "run-merged" / "merge_report.json").is_file()


def test_a_job_that_may_not_be_queued_again_ends_with_the_command_that_goes_on(small_jobs):
    folder, jobs = small_jobs
    wait_for(jobs["warned"], "FAILED")
    log = log_of(jobs["warned"])
    assert "this job may not be queued again. To go on: slurm/submit.sh --nodes=1" in log and "Traceback" not in log
    assert "ExitCode=75:0" in run("scontrol", "show", "job", jobs["warned"]).stdout
    (attempt,) = progress_of(folder / "warned")["attempts"]
    assert attempt["reason"] == "SIGUSR2" and (folder / "warned" / f"checkpoint-{attempt['step']}").is_dir()


def test_a_sweep_trains_each_point_in_a_folder_and_the_runs_are_a_group(small_jobs):
    folder, jobs = small_jobs
    wait_for(jobs["sweep"], "COMPLETED")
    for rank in (4, 8):
        run_folder = folder / "sweep" / f"lora_r={rank}"
        assert json.loads((run_folder / "adapter_config.json").read_text())["r"] == rank
        (attempt,) = read_attempts(run_folder)
        assert attempt["group"] == f"array-{jobs['sweep']}" and attempt["config"]["lora_r"] == rank


def test_a_chain_stops_when_its_first_job_fails(small_jobs):
    folder, jobs = small_jobs
    wait_for(jobs["hopeless prepare"], "FAILED")
    for name in ("train", "evaluate", "merge"):
        wait_for(jobs[f"hopeless {name}"], "CANCELLED")
    assert not (folder / "hopeless" / "run").exists()
