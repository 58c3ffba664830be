"""What goes wrong outside of a command, as one sentence: full disks, files that cannot be read, processes that are killed.

A stack trace is for mistakes of the program. Standard library only.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "Free space, or inodes (df -i), on that disk",
    errno.EDQUOT: "Free space in your quota (quota -s)",
    errno.EROFS: "Choose a folder on a disk that can be written",
    errno.EACCES: "Choose a folder that is yours, or have its owner change the rights",
    errno.EIO: "The disk or its network fails: copy what is there, and choose another",
}
# How PyTorch's and safetensors' writers say that a write failed.
WRITE_FAILED = (
    "enforce fail at inline_container",
    "PytorchStreamWriter failed",
    "file write failed",
    "I/O error",
    "iostream error",
)
# "DataLoader worker (pid 71) is killed by signal: Killed." and "DataLoader worker (pid(s) 71) exited unexpectedly"
LOST_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\.|exited)")
NO_TERMINAL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def describe_lost_loader(processes: str, ended_by: str) -> str:
    """What is said of a process that reads data and is gone, where no more is known."""
    return (
        f"a process that reads data ({processes}) was ended by {ended_by}: too little memory, or a damaged file "
        "(scripts/check_data.py finds it). The same command continues from the last checkpoint"
    )


@contextmanager
def lost_loaders_named(describe: Callable[[str, str], str] = describe_lost_loader) -> Iterator[None]:
    """A process that reads data and is gone (PyTorch's RuntimeError) becomes a ValueError with a sentence.

    `describe` makes it of the process's number and what ended it.
    """
    try:
        yield
    except RuntimeError as error:
        lost = LOST_LOADER.search(str(error))
        if lost is None:
            raise
        raise ValueError(describe(lost[1], lost[2] or "itself")) from error


def sentence(error: Exception) -> str:
    """What an error says, without the trace that PyTorch's loader processes put around it, fit for a terminal."""
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno)
        text = f"{place}{error.strerror.lower()}{f'. {remedy}' if remedy else ''}"
    if "Original Traceback" in text:
        said = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)
        text = said[-1]
    return harmless(text)


def harmless(text: str) -> str:
    """Text for a terminal: characters that would steer it (in names of files, in cells) are written out as `\\x1b`."""
    return text.translate(NO_TERMINAL)


@contextmanager
def writing(path: Path | str, *others: type[Exception]) -> Iterator[None]:
    """Errors of a write in this block are OSErrors that name `path`: the system's own often name nothing.

    `others` are what libraries raise beside RuntimeError; what does not tell of a failed write is passed on.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        theirs = type(error) is Exception or isinstance(
            error, (RuntimeError, *others)
        )  # tokenizers has no class of its own
        if not theirs or not (number or any(words in str(error) for words in WRITE_FAILED)):
            raise
        if number:
            raise OSError(
                int(number[1]), str(error).partition(" (os error")[0].rpartition(": ")[2], str(path)
            ) from error
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}). Is the disk full?") from error
