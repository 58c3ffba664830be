"""One process at a time writes a run, an evaluation, an answers file or a merged model.

`filelock.SoftFileLock` keeps a file that names host and process, made by an exclusive create, which NFS knows too. A lock
whose process is gone from this host is taken over. One of another host cannot be proved dead from here: the error says
who holds it, and which file to delete where that machine is down.
"""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLock, Timeout

from finetuning.failures import writing
from finetuning.main_process import refuse_together

PATIENCE = 1.0  # seconds to wait for a lock, in which a stale one is found and taken over
HALF_MADE = 10.0  # seconds after which a lock without a record is one whose maker was killed
HELD: dict[Path, SoftFileLock] = {}  # by this process
HOLDER = os.getpid()


def lock_file(path: Path) -> Path:
    """The hidden file beside a folder or file that is locked: the folder itself may be renamed meanwhile."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.lock")


def take_lock(path: Path, what: str, *, owner_has_ended: bool = False) -> None:
    """Lock a folder or file for this process, until `give_back` or its end. Called by all processes together.

    `what` is written there now, such as `a training`. `owner_has_ended`: whoever has the lock is known to be gone, on
    whatever host. Raises ValueError in all processes, which says who has it.
    """
    refuse_together(lambda: try_lock(path, what, owner_has_ended=owner_has_ended))


def try_lock(path: Path, what: str, *, owner_has_ended: bool = False) -> str | None:
    """Take the lock for this process; the sentence for people where it cannot be had."""
    give_back(path)
    file = lock_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(file)
    if owner_has_ended or is_half_made(file):
        lock.break_lock()
    try:
        with writing(file):
            lock.acquire(timeout=PATIENCE)
    except Timeout:
        return (
            f"{path}: {what} by {holder_of(file)} is writing here. Wait until it has ended, or stop it; if that machine is "
            f"down, delete {file}"
        )
    HELD[file] = lock
    return None


@atexit.register
def give_all_back() -> None:
    """A command that ends in an error leaves no lock behind. Processes forked from it have no part in this."""
    for lock in HELD.values():
        if lock.is_locked and os.getpid() == HOLDER:
            lock.release()


def give_back(path: Path) -> None:
    """Release the lock of this process, if it has it."""
    if lock := HELD.pop(lock_file(path), None):
        lock.release()


@contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """`take_lock` for the length of a `with` block."""
    take_lock(path, what)
    try:
        yield
    finally:
        give_back(path)


def lock_inside(folder: Path) -> str | None:
    """A sentence where another process has a lock inside of `folder`, such as an evaluation of the run; None where none.

    The folder must not be renamed then. Locks of processes that are gone are removed.
    """
    for file in folder.rglob(".*.lock"):
        locked = file.with_name(file.name.removeprefix(".").removesuffix(".lock"))
        if problem := try_lock(locked, "another command"):
            return problem
        give_back(locked)
    return None


def holder_of(file: Path) -> str:
    """`process 4711 on node7`, as the lock says it."""
    lines = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return f"process {lines[0]} on {lines[1].partition('?')[0]}" if len(lines) > 1 else "another process"


def is_half_made(file: Path) -> bool:
    """Whether a lock names nobody although its maker had time to: it was killed in between."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return False
    return status.st_size == 0 and time.time() - status.st_mtime > HALF_MADE
