"""`accelerate launch` whose processes are forked from one that has imported all: a command for `fork_server.Commands`.

    tests/support/forked_launch.py --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/train_llava.py ...

accelerate reads the file and sets the environment as ever. In place of torchrun, which starts Python anew for each process,
each is forked here, and told its rank; one that fails ends the others.
"""

import atexit
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

ON_CPU = Path(__file__).parent / "on_cpu" / "sitecustomize.py"


def run_script(words: list[str]) -> int:
    """The command as Python would run it; its exit code."""
    sys.argv, code = words, 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def fork_processes(args) -> None:
    """What `torch.distributed.run.run` does with `args`; ends this process with the first code that is not 0."""
    number = int(args.nproc_per_node)
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    running, failed = set(), 0
    for rank in range(number):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                runpy.run_path(str(ON_CPU))
                code = run_script([args.training_script, *args.training_script_args])
            finally:
                os._exit(code)
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if os.waitstatus_to_exitcode(status) and not failed:
            failed = 1
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(failed)


if __name__ == "__main__":
    torch.distributed.run.run = fork_processes
    launch_command(launch_command_parser().parse_args(sys.argv[1:]))
