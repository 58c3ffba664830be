"""Loader processes that go on to the next epoch while the last step of this one is computed.

A DataLoader starts an epoch with empty hands: its first batch is waited for, which short epochs feel. With workers that
live on (`dataloader_persistent_workers`) it can be asked for the next epoch as soon as it has handed out this one's last
batch. Rows, their order and the random numbers of training stay those of a loader that does not read ahead.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, SequentialSampler

from finetuning import upstream


def read_next_epoch_ahead(loader: DataLoader) -> bool:
    """Let a DataLoader with persistent workers read ahead; in place. False where it cannot.

    It can where the order of an epoch follows from the epoch's number: another sampler draws it from the random numbers
    that training uses.
    """
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # accelerate's part of each process
        batches = batches.batch_sampler
    fixed_order = isinstance(getattr(batches, "sampler", None), (SeedableRandomSampler, SequentialSampler))
    if not (loader.persistent_workers and loader.num_workers and fixed_order):
        return False
    begin = loader.__iter__
    ahead: list[Iterator] = []

    def iterate() -> Iterator[Any]:
        iterator = ahead.pop() if ahead else None
        if iterator is not None and iterator is loader._iterator:  # and its processes were not ended
            torch.empty((), dtype=torch.int64).random_()  # the number that a new epoch draws for its workers
        else:
            iterator = begin()
        yield from iterator
        before = torch.get_rng_state()
        ahead.append(begin())
        torch.set_rng_state(before)

    upstream.replace(loader, "__iter__", iterate)
    return True


def end_readers(loaders: list[DataLoader]) -> None:
    """End the processes of loaders that nobody reads any more, and empty the list.

    The garbage collector closes the queues before it tells the processes to end: they are waited for, five seconds each.
    """
    for loader in loaders:
        if loader._iterator is not None and loader.num_workers:
            loader._iterator._shutdown_workers()
            loader._iterator = None
    loaders.clear()
