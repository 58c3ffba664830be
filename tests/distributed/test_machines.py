"""A training over two machines, which are network namespaces here, ends soon and in a sentence when one of them is gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

LIMIT = 8
# Sums over both machines, again and again, as a training does.
TRAINING = f"""
import sys
import torch
import torch.distributed as dist
from finetuning import command
from finetuning.distributed.machines import watch_machines

def main():
    with watch_machines({LIMIT}):
        for step in range(100_000):
            dist.all_reduce(torch.ones(1))
            if step == 5:
                open(sys.argv[1], "w").close()

dist.init_process_group("gloo")
command.run(main)
"""


@pytest.fixture
def machines():
    """The names of two namespaces whose links, `link0` and `link1`, reach each other; removed at the end."""
    names = [f"finetuning{os.getpid()}n{node}" for node in range(2)]
    allowed = shutil.which("ip") and subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    if not allowed or allowed.returncode:
        pytest.skip("network namespaces cannot be made here: that needs root and iproute2")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.71.0.{node + 1}/24", "dev", f"link{node}")
            for link in ("lo", f"link{node}"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@contextmanager
def training_on(machines: list[str], folder: Path):
    """A training with a process on each; yields the two once both are under way."""
    ranks = [{"RANK": str(node), "GROUP_RANK": str(node), "GLOO_SOCKET_IFNAME": f"link{node}"} for node in range(2)]
    shared = {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.71.0.1"}
    shared |= {"MASTER_PORT": "29871", "PYTHONPATH": str(ROOT / "scripts")}
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", TRAINING, folder / f"begun{node}"],
            env=os.environ | shared | ranks[node], stderr=subprocess.PIPE, text=True,
        )
        for node, name in enumerate(machines)
    ]  # fmt: skip
    try:
        until = time.monotonic() + 120
        while len(list(folder.glob("begun*"))) < 2 and time.monotonic() < until:
            assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
            time.sleep(0.1)
        yield processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_machine_that_falls_silent_ends_the_training_everywhere(machines, tmp_path):
    with training_on(machines, tmp_path) as processes:
        subprocess.run(["ip", "-n", machines[1], "link", "set", "link1", "down"], check=True)
        said = [process.communicate(timeout=3 * LIMIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert f"machine 1 is silent since {LIMIT} s. The last checkpoint is whole" in said[0]
    assert f"machine 0 is silent since {LIMIT} s. The last checkpoint is whole" in said[1]
    assert not any("Traceback" in words for words in said)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_at_once(machines, tmp_path):
    with training_on(machines, tmp_path) as (first, second):
        second.kill()
        said = first.communicate(timeout=LIMIT)[1]
    assert first.returncode == 1 and "Traceback" not in said
    assert "another process of this training has ended: its own log says why. The last checkpoint is whole" in said


SLOW_LINK = "tbf rate 8mbit burst 32kb latency 400ms"
RECIPE = {
    "global_batch_size": 4, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential",
    "max_steps": 16, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "eval_strategy": "no",
    "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-4, "lora_dropout": 0.0,
}  # fmt: skip


def launched(machine: str | None, node: int, machines: int, run: Path, flags: dict) -> subprocess.Popen:
    """The recipe by `accelerate launch` on one of so many `machines`, with a process on each."""
    words = [word for key, value in (RECIPE | flags | {"output_dir": run}).items() for word in (f"--{key}", str(value))]
    rendezvous = ["--machine_rank", str(node), "--main_process_ip", "10.71.0.1", "--main_process_port", "29872"]
    log = (run.parent / f"{run.name}-{node}-of-{machines}.log").open("w")
    return subprocess.Popen(
        [
            *(("ip", "netns", "exec", machine) if machine else ()),
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"),
            *("--num_machines", str(machines), "--num_processes", str(machines)),
            *(rendezvous if machines > 1 else ("--main_process_port", "0")),
            *("scripts/train_llava.py", "--config", "scripts/configs/llava_sample.yaml", *words),
        ],
        cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "support" / "on_cpu"),
            **({"GLOO_SOCKET_IFNAME": f"link{node}"} if machine else {}),
        },
    )  # fmt: skip


@pytest.mark.slow
def test_over_a_slow_link_a_machine_dies_and_the_same_command_goes_on_with_the_other(
    machines, tiny_llava, cctv_dataset, tmp_path
):
    for node, name in enumerate(machines):
        command = ["tc", "-n", name, "qdisc", "add", "dev", f"link{node}", "root", *SLOW_LINK.split()]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("tc cannot slow a link here: that needs iproute2 and the kernel's sch_tbf")
    flags = {"model_name_or_path": tiny_llava, "dataset_name": cctv_dataset}
    run, alone = tmp_path / "run", tmp_path / "alone"
    both = [launched(name, node, 2, run, flags) for node, name in enumerate(machines)]
    try:
        until = time.monotonic() + 300
        while not (run / "checkpoint-4").is_dir():
            assert time.monotonic() < until and both[0].poll() is None, (tmp_path / "run-0-of-2.log").read_text()
            time.sleep(0.1)
        # Without power: nothing more is sent, no connection is closed.
        subprocess.run(["ip", "-n", machines[1], "link", "set", "link1", "down"], check=True)
        gone = time.monotonic()
        listed = subprocess.run(["ip", "netns", "pids", machines[1]], capture_output=True, text=True, check=True)
        for pid in map(int, listed.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        both[0].wait(timeout=120)
        assert both[0].returncode != 0 and time.monotonic() - gone < 60
    finally:
        for process in both:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "run-0-of-2.log").read_text()
    assert (
        said.count("The last checkpoint is whole: the same command continues, on the machines that are left too") == 1
    )
    for folder in (run, alone):
        assert launched(None, 0, 1, folder, flags).wait(timeout=300) == 0, (
            tmp_path / f"{folder.name}-0-of-1.log"
        ).read_text()
    assert "Continuing from" in (tmp_path / "run-0-of-1.log").read_text()
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (run, alone)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == RECIPE["max_steps"] and losses[0] == pytest.approx(losses[1], abs=1e-4)
