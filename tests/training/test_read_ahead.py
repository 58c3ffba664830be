"""A loader that reads the next epoch ahead gives the same rows and leaves training the same random numbers."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, RandomSampler

from finetuning.training.read_ahead import end_readers, read_next_epoch_ahead

ROWS = list(range(10))


def loader(persistent: bool, **kwargs) -> DataLoader:
    sampler = SeedableRandomSampler(ROWS, data_seed=3)
    return DataLoader(
        ROWS, batch_size=4, sampler=sampler, num_workers=1, persistent_workers=persistent, prefetch_factor=2, **kwargs
    )


def epochs(batches: DataLoader) -> list:
    """Rows of three epochs, and what training draws after each batch."""
    torch.manual_seed(0)
    return [[(batch.tolist(), torch.rand(()).item()) for batch in batches.__iter__()] for _ in range(3)]


def test_rows_order_and_random_numbers_are_those_of_a_loader_that_starts_anew():
    expected = epochs(loader(persistent=False))
    ahead = loader(persistent=True)
    assert read_next_epoch_ahead(ahead)
    assert epochs(ahead) == expected
    assert len({str(epoch) for epoch in expected}) == 3


@pytest.mark.slow
def test_the_next_epoch_is_asked_for_when_this_one_has_ended():
    ahead = loader(persistent=True)
    read_next_epoch_ahead(ahead)
    assert len(list(ahead.__iter__())) == 3
    assert ahead.sampler.epoch == 1
    assert ahead._iterator._tasks_outstanding > 0


@pytest.mark.slow
def test_readers_of_the_next_epoch_end_as_they_are_told():
    ahead = loader(persistent=True)
    read_next_epoch_ahead(ahead)
    list(ahead.__iter__())
    processes = ahead._iterator._workers
    end_readers([ahead])
    assert [process.exitcode for process in processes] == [0]  # -15 where they had to be stopped, after five seconds
    assert len(list(ahead.__iter__())) == 3


def test_a_loader_whose_order_comes_from_training_s_random_numbers_stays_as_it_is():
    plain = DataLoader(ROWS, sampler=RandomSampler(ROWS), num_workers=1, persistent_workers=True)
    assert not read_next_epoch_ahead(plain)
    assert not read_next_epoch_ahead(loader(persistent=False))
