"""A barrier without time-out, for work that the first process does alone: tokenizing a large dataset."""

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
    """A context in which `PartialState().wait_for_everyone()`, and so `main_process_first()`, waits without a time-out.

    accelerate's barrier is a collective. NCCL aborts it, and the run, after `ddp_timeout` seconds, even if the first
    process still tokenizes (LlamaFactory#2424, alignment-handbook#190). Here each process polls the rendezvous store
    every 0.1 s; if the first process dies, the launcher ends the others. One process alone needs no barrier.
    """
    if not dist.is_initialized():
        yield
        return
    store, processes = dist.distributed_c10d._get_default_store(), dist.get_world_size()

    def wait_for_everyone(state: PartialState) -> None:
        barrier = f"finetuning.barrier/{next(BARRIER_NUMBERS)}"
        arrived = store.add(barrier, 1)
        while arrived < processes:
            time.sleep(0.1)
            arrived = store.add(barrier, 0)

    by_collective = upstream.replace(PartialState, "wait_for_everyone", wait_for_everyone)
    try:
        yield
    finally:
        PartialState.wait_for_everyone = by_collective
