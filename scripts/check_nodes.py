"""Before training, on every node of a job: is all there, and do the nodes reach each other? Names the node that is bad.

    srun --ntasks-per-node=1 python scripts/check_nodes.py scripts/train_llava.py ddp --config RECIPE [flags]

slurm/train.slurm runs it. On each node: GPUs, as many as the job should have, each of which computes; dataset and base
model readable; the run's folder writable, with room. Then all nodes meet at the first one, at a port that must be free
there, and add a number up (NCCL where there are GPUs). Exits with 1 and one line per problem; a node that does not come
within 20 seconds is one.
"""

from finetuning import command  # first: see there

# isort: split

import datetime
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from finetuning.arguments import parse_arguments
from finetuning.data.dataset import open_dataset
from finetuning.families import is_vision
from finetuning.flags import Parser
from finetuning.models.processing import load_config
from finetuning.strategy import launch_problems

PATIENCE = datetime.timedelta(seconds=20)
ROOM = 5 * 2**30  # bytes: a few checkpoints of a LoRA, or the file system is close to full


def gpu_problems(expected: int) -> list[str]:
    """What is wrong with this machine's GPUs, each tried by a sum."""
    visible = torch.cuda.device_count()
    problems = [] if visible >= expected else [f"{visible} GPUs visible, {expected} expected"]
    for index in range(min(visible, expected)):
        try:
            if torch.ones(1024, device=f"cuda:{index}").sum().item() != 1024:
                problems.append(f"GPU {index} computes wrongly")
        except RuntimeError as error:
            problems.append(f"GPU {index}: {str(error).splitlines()[0]}")
    return problems


def file_problems(dataset_name: str, model_name: str, revision: str, output_dir: str) -> list[str]:
    """What of the job's files this machine cannot read, or cannot write."""
    problems = []
    try:
        vision = is_vision(load_config(model_name, revision))
        open_dataset(dataset_name, vision=vision)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problems.append(f"{folder}: cannot be written ({error.strerror})")
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        problems.append(f"{folder}: {free / 2**30:.1f} GiB free, {ROOM / 2**30:.0f} GiB wanted")
    return problems


def port_problem(port: int) -> str | None:
    """What keeps this node from being met at `port`; None when nothing does."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return (
            f"port {port}, where the nodes are to meet, is taken by another program ({error.strerror}). It follows from "
            "the job's number: submit again, a new job has another port"
        )
    return None


def sum_over_nodes(store: dist.Store, rank: int, world: int) -> str | None:
    """What went wrong when all nodes added up one number each; None when nothing did."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = "cuda:0" if backend == "nccl" else "cpu"
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore("sum", store), rank=rank, world_size=world, timeout=PATIENCE
        )
        number = torch.full((1,), float(rank + 1), device=device)
        work = dist.all_reduce(number, async_op=True)
        work.wait(PATIENCE)
        expected = world * (world + 1) / 2
        return None if number.item() == expected else f"{backend} added up to {number.item()}, not {expected}"
    except RuntimeError as error:
        return f"{backend} over all nodes: {str(error).splitlines()[0]}"


def main() -> None:
    """Check this node and the others, as slurm/train.slurm asks. Raises ValueError with every problem of any node."""
    parser = Parser(__doc__)
    parser.add_argument("script", help="training command, such as scripts/train_llava.py")
    parser.add_argument("strategy", help="file of accelerate_configs/, without .yaml")
    args, flags = parser.parse_known_args()
    try:
        rank, world = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_JOB_NUM_NODES"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        processes = int(os.environ["PROCESSES_PER_NODE"])
        names = os.environ["NODE_NAMES"].split()
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set: this command is run by slurm/train.slurm") from error
    script_args, training_args, model_args = parse_arguments(Path(args.script), flags)
    gpus = processes if "SLURM_GPUS_ON_NODE" in os.environ else 0
    problems = launch_problems(args.script, args.strategy, world * processes) + gpu_problems(gpus)
    problems += file_problems(
        script_args.dataset_name,
        model_args.model_name_or_path,
        model_args.model_revision,
        training_args.output_dir,
    )
    host = socket.gethostname()
    if rank == 0 and (taken := port_problem(port)):
        raise ValueError(lines_of(host, [taken, *problems]))
    try:
        # The first node may be the last to have read its Python files.
        store = dist.TCPStore(address, port, world, rank == 0, 3 * PATIENCE, wait_for_workers=False)
        store.set(f"node-{rank}", json.dumps([host, problems]))
    except RuntimeError as error:
        raise ValueError(f"{host} does not reach {address}:{port} ({str(error).splitlines()[0]})") from error
    if rank == 0:
        refuse_bad_nodes(store, names)
        store.set("all-there", "yes")
    else:
        try:
            store.wait(["all-there"], 3 * PATIENCE)
        except RuntimeError:
            sys.exit(1)  # the first node has said what is wrong
    failure = sum_over_nodes(store, rank, world)
    if failure:
        raise ValueError(f"{host}: {failure}")
    if rank == 0:
        print(f"Nodes checked: {world}, {processes} processes each; they reach each other")
    dist.destroy_process_group()


def lines_of(host: str, problems: list[str]) -> str:
    """A line for each problem of a node, which it names."""
    return "\n".join(f"{host}: {problem}" for problem in problems)


def refuse_bad_nodes(store: dist.Store, names: list[str]) -> None:
    """Raise ValueError with the problems of all nodes, on the first one."""
    lines = []
    for rank, name in enumerate(names):
        try:
            store.wait([f"node-{rank}"], PATIENCE)
            host, problems = json.loads(store.get(f"node-{rank}"))
            lines += [lines_of(host, problems)] if problems else []
        except RuntimeError:
            lines.append(f"{name}: did not reach {os.environ['MASTER_ADDR']} within {PATIENCE.seconds} s")
    if lines:
        raise ValueError("\n".join(lines))


if __name__ == "__main__":
    command.run(main)
