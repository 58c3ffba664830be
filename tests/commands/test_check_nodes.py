"""The check of a job's nodes before training: the node that is bad is named, and everything that is bad about it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_here


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)


def job(node: int, nodes: int, port: int) -> dict[str, str]:
    """What srun tells one of `nodes` nodes of a job, all of which are this machine."""
    return {
        "SLURM_NODEID": str(node), "SLURM_JOB_NUM_NODES": str(nodes), "PROCESSES_PER_NODE": "1",
        "NODE_NAMES": "\n".join(f"node{number}" for number in range(nodes)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def command(model: Path, dataset: Path, output: Path) -> list[str]:
    flags = ("--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output)
    words = ["scripts/check_nodes.py", "scripts/train_llava.py", "ddp", "--config", "scripts/configs/llava_sample.yaml"]
    return [*words, *map(str, flags)]


def test_a_port_that_is_taken_is_told_with_everything_else(monkeypatch, tiny_llava, tmp_path):
    with socket.create_server(("", 0)) as other_program:
        port = other_program.getsockname()[1]
        for name, value in job(0, 1, port).items():
            monkeypatch.setenv(name, value)
        result = run_here(*command(tiny_llava, tmp_path / "no-data-here", tmp_path / "run"))
    assert result.returncode == 1
    host = socket.gethostname()
    assert (
        f"check_nodes.py: {host}: port {port}, where the nodes are to meet, is taken by another program"
        in result.stderr
    )
    assert f"\n{host}: {tmp_path / 'no-data-here'}: no dataset here" in result.stderr


def test_what_is_wrong_on_one_node_ends_the_check_on_all(tiny_llava, cctv_dataset, tmp_path):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    missing = tmp_path / "not-mounted"
    first, second = (
        subprocess.Popen(
            [sys.executable, *command(tiny_llava, dataset, tmp_path / "run")],
            cwd=ROOT,
            env=os.environ | job(node, 2, port),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for node, dataset in enumerate((cctv_dataset, missing))
    )
    _, errors = first.communicate()
    second.communicate()
    assert (first.returncode, second.returncode) == (1, 1) and "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("check_nodes.py: ")]
    assert len(said) == 1 and f"{missing}: no dataset here" in said[0]
