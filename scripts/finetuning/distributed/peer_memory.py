"""Shards of the other GPUs of a host, read by copy engines, where GPUs can read each other's memory (NVLink, PCIe).

NCCL's all-gather takes some of a GPU's processors from the products beside it, and begins when the last process comes to it.
Frozen shards never change: each process copies what it needs when it needs it, and waits for nobody.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor


class PeerCopies:
    """Fills buffers with all processes' shards on a stream of its own."""

    def __init__(self, shards_of: Sequence[Sequence[Tensor]], rank: int):
        """`shards_of[process][layer]`, this process's own among them, all to be read by this process's device."""
        self.shards_of, self.stream = shards_of, torch.cuda.Stream()
        # Each begins with the process after it, so that no two read from one at a time.
        self.order = [(rank + step) % len(shards_of) for step in range(1, len(shards_of) + 1)]

    def start(self, full: Tensor, layer: int) -> torch.cuda.Event:
        """Copy all shards of `layer` into `full`, once what the current stream has to do is done; `wait` for the event."""
        self.stream.wait_stream(torch.cuda.current_stream())
        parts = full.chunk(len(self.shards_of))
        with torch.cuda.stream(self.stream):
            for process in self.order:
                parts[process].copy_(self.shards_of[process][layer], non_blocking=True)
        return self.stream.record_event()


def open_peers(shards: Tensor, lengths: Sequence[int]) -> PeerCopies | None:
    """Copies out of the `shards` (bytes, of layers of these `lengths`) of all processes; None where they cannot be read.

    Called by all processes together, each with its final shards, which stay in memory as long as any process lives. All
    open them or none.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    if shards.device.type != "cuda" or processes == 1:
        return None
    torch.cuda.synchronize()
    try:
        own = reduce_tensor(shards)[1]
    except RuntimeError:  # cudaMallocAsync has no such memory; WSL and parts of a GPU (MIG) share none
        own = None
    told: list = [None] * processes
    dist.all_gather_object(told, (shards.device.index, own))
    opened: list[Tensor] = []
    if all(handle for _, handle in told) and can_read_peers(shards.device, [index for index, _ in told]):
        try:
            for process, (_, handle) in enumerate(told):
                # Opened for this device: for the other's own this process would make a context on it, half a GB.
                other = (*handle[:6], shards.device.index, *handle[7:])
                opened.append(shards if process == rank else rebuild_cuda_tensor(*other))
        except RuntimeError:  # a container may forbid it
            opened = []
    if not all_of_them(len(opened) == processes, shards.device):
        return None
    copies = PeerCopies([list(shard.split(list(lengths))) for shard in opened], rank)
    return copies if all_of_them(are_right(copies, lengths[0]), shards.device) else None


def can_read_peers(device: torch.device, indices: Sequence[int]) -> bool:
    """Whether the processes are of one host, see each other's GPUs, one each, and these can read each other's memory."""
    of_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not of_one_host or len(set(indices)) < len(indices) or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    others = [index for index in indices if index != device.index]
    return all(
        index < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, index) for index in others
    )


def are_right(copies: PeerCopies, length: int) -> bool:
    """Whether copies of the first layer are what an all-gather gives: some hosts' PCIe hands out other bytes."""
    shard = copies.shards_of[dist.get_rank()][0]
    copied, gathered = (shard.new_zeros(len(copies.shards_of) * length) for _ in range(2))
    copies.start(copied, 0).wait()
    dist.all_gather_into_tensor(gathered, shard)
    return torch.equal(copied, gathered)


def all_of_them(holds: bool, device: torch.device) -> bool:
    """Whether something holds in every process."""
    answer = torch.tensor([int(holds)], device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer.item())
