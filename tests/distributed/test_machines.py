"""A training over two machines, which are network namespaces here, ends soon and in a sentence when one of them is gone."""

import os
import shutil
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
