"""Processes that wait for the first one as long as it takes."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState

from finetuning import upstream

BARRIER_NUMBERS = itertools.count()


@contextmanager
def barriers_without_timeout() -> Iterator[None]:
    """Inside, `PartialState().wait_for_everyone()`, and with it `main_process_first()`, waits without a time-out.

    accelerate waits by a collective, which NCCL ends after `ddp_timeout` seconds, and the run with it, though the first
    process still tokenises a large dataset (LlamaFactory#2424, alignment-handbook#190). Here each process asks the store
    by which the processes found each other; if the first one dies, the launcher ends the others.
    """
    if not dist.is_initialized():
        yield
        return
    store, processes = dist.distributed_c10d._get_default_store(), dist.get_world_size()

    def wait_for_everyone(state: PartialState) -> None:
        meeting = f"finetuning.waiting/{next(BARRIER_NUMBERS)}"
        arrived = store.add(meeting, 1)
        while arrived < processes:
            time.sleep(0.1)
            arrived = store.add(meeting, 0)

    by_collective = upstream.replace(PartialState, "wait_for_everyone", wait_for_everyone)
    try:
        yield
    finally:
        PartialState.wait_for_everyone = by_collective
