"""The check of a job's nodes before training: the node that is bad is named, and everything that is bad about it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def start(node: int, nodes: int, port: int, model: Path, dataset: Path, output: Path) -> subprocess.Popen:
    """check_nodes.py as srun starts it on one of `nodes` nodes, all of which are this machine."""
    environment = os.environ | {
        "SLURM_NODEID": str(node), "SLURM_JOB_NUM_NODES": str(nodes), "PROCESSES_PER_NODE": "1",
        "NODE_NAMES": "\n".join(f"node{number}" for number in range(nodes)),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    environment.pop("SLURM_GPUS_ON_NODE", None)
    flags = ("--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output)
    command = [sys.executable, "scripts/check_nodes.py", "scripts/train_llava.py", "ddp"]
    command += ["--config", "scripts/configs/llava_sample.yaml", *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_port_that_is_taken_is_told_with_everything_else(tiny_llava, tmp_path):
    with socket.create_server(("", 0)) as other_program:
        port = other_program.getsockname()[1]
        process = start(0, 1, port, tiny_llava, tmp_path / "no-data-here", tmp_path / "run")
        _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    host = socket.gethostname()
    assert f"check_nodes.py: {host}: port {port}, where the nodes are to meet, is taken by another program" in errors
    assert f"check_nodes.py: {host}: {tmp_path / 'no-data-here'}: no dataset here" in errors


def test_what_is_wrong_on_one_node_ends_the_check_on_all(tiny_llava, cctv_dataset, tmp_path):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    missing = tmp_path / "not-mounted"
    first, second = (
        start(node, 2, port, tiny_llava, dataset, tmp_path / "run")
        for node, dataset in enumerate((cctv_dataset, missing))
    )
    _, errors = first.communicate()
    second.communicate()
    assert (first.returncode, second.returncode) == (1, 1) and "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("check_nodes.py: ")]
    assert len(said) == 1 and f"{missing}: no dataset here" in said[0]
