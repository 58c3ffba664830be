"""A training over several machines ends soon, and in a sentence, when one of them is gone.

A process that dies closes its connections, and the others' next message fails. A machine that loses power or network closes
nothing: NCCL and gloo wait for `ddp_timeout`, half an hour, and launchers do not look at each other. So each machine counts
up a number in the rendezvous store, and ends where another's stands still.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from finetuning.command import say_last

BEAT, LIMIT = 3.0, 40.0  # seconds between two counts; without one until a machine is taken for gone
ENDED = 1_000_000_000  # added to a machine's number when it has no more to train
CONTINUE = (
    "The last checkpoint is whole: the same command continues, on the machines that are left too (docs/multi_gpu.md)"
)
LOST_CONNECTION = re.compile(
    r"gloo/transport|Connection (closed|reset) by (remote )?peer|remote process exited|ncclRemoteError|Broken pipe"
)


@contextmanager
def watch_machines(limit: float = LIMIT) -> Iterator[None]:
    """A context that ends this process when another machine was silent for `limit` seconds.

    Raises ValueError in place of what torch.distributed raises of a connection that another process closed.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    watch = Watch(nodes, limit) if dist.is_initialized() and nodes > 1 and os.environ["LOCAL_RANK"] == "0" else None
    try:
        yield
    except RuntimeError as error:
        if not LOST_CONNECTION.search(str(error)):
            raise
        raise ValueError(f"another process of this training has ended: its own log says why. {CONTINUE}") from error
    finally:
        if watch is not None:
            watch.end()


class Watch:
    """Counts for this machine, and looks at the others' numbers, in two threads: a store that is gone never answers.

    Args:
        nodes: how many machines there are.
        limit: seconds without a count.
    """

    def __init__(self, nodes: int, limit: float):
        self.node, self.limit, self.ended = int(os.environ["GROUP_RANK"]), limit, threading.Event()
        # A client of its own: the default one waits for others while a barrier does.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set_timeout(timedelta(seconds=limit))
        now = time.monotonic()
        self.answered, self.numbers, self.seen = now, [0] * nodes, [now] * nodes
        for work in (self.count, self.look):
            threading.Thread(target=self.repeat, args=(work,), daemon=True).start()

    def repeat(self, work: Callable[[], None]) -> None:
        """Call `work` until the end."""
        while not self.ended.wait(min(BEAT, self.limit / 4)):
            work()

    def count(self) -> None:
        """Count for this machine, and note which others did."""
        for node, before in enumerate(self.numbers):
            try:
                number = self.store.add(f"finetuning.machines/{node}", int(node == self.node))
            except dist.DistError:
                return  # `look` says so, when it lasts
            if number != before or number >= ENDED:
                self.numbers[node], self.seen[node] = number, time.monotonic()
        self.answered = time.monotonic()

    def look(self) -> None:
        """End this process where another machine's number, or the store's answer, is too old."""
        now = time.monotonic()
        silent = [node for node, seen in enumerate(self.seen) if now - seen > self.limit]
        if now - self.answered > self.limit:
            silent = [0]  # which keeps the store
        if silent and not self.ended.is_set():
            named = " and ".join(str(node) for node in silent if node != self.node)
            say_last(f"{Path(sys.argv[0]).name}: machine {named} is silent since {self.limit:.0f} s. {CONTINUE}")
            os._exit(1)  # this process waits for a message, and heeds no exception

    def end(self) -> None:
        """No more counts: the others need not wait for this machine."""
        self.ended.set()
        farewell = threading.Thread(target=self.say_ended, daemon=True)
        farewell.start()
        farewell.join(self.limit / 4)  # longer only where nobody answers

    def say_ended(self) -> None:
        """Tell the others."""
        with suppress(dist.DistError):  # the machine that keeps the store has ended before
            self.store.add(f"finetuning.machines/{self.node}", ENDED)
