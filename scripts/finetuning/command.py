"""How every command begins and ends: a mistake is one sentence, the last on the screen, and Ctrl-C is no stack trace.

Standard library only. Commands whose imports take seconds import it first: Ctrl-C is told in a sentence then, too, and what
libraries warn of as they are imported is known (`known_warnings`).
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

from finetuning import known_warnings
from finetuning.failures import lost_loaders_named, sentence

LAUNCHER = os.getppid()  # not of processes forked from this one
LAUNCHERS = re.compile(r"(^|/)(accelerate|torchrun)$|accelerate[./]commands|torch[./]distributed[./]run")
STOPPED = "stopped. Nothing is half written: the same command goes on, or begins anew"
OTHERS = 10.0  # seconds that the first process of several has to say what all of them would say
AGAIN = 0.02  # seconds after which a Ctrl-C that Python has dropped comes again
# After the launcher's own stack trace, if it prints one: when it has ended, and at most a minute later.
REPEAT = """n=0
while grep -qs "^State:.[^ZX]" "/proc/$1/status" && [ $n -lt 1200 ]; do sleep 0.05; n=$((n+1)); done
printf "\\n%s\\n" "$2" >&2"""


def is_main_process() -> bool:
    """Whether this is the process that speaks: known from the environment, before PyTorch is imported."""
    return os.environ.get("RANK", "0") == "0"


def is_launched() -> bool:
    """Whether `accelerate launch` (or torchrun) started this process."""
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


def launch_words() -> list[str]:
    """The command line of the launcher that started this process; empty without one, or when it has ended."""
    try:
        words = Path(f"/proc/{LAUNCHER}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return []
    # The environment alone does not tell: a training sets it for itself, and whom it starts inherits it.
    is_launcher = os.getppid() == LAUNCHER and any(map(LAUNCHERS.search, words[:4]))
    return words if is_launcher and is_launched() else []


def say_last(sentence: str) -> None:
    """Print a sentence to stderr; where `accelerate launch` prints a stack trace of its own behind it, once more at the end."""
    print(sentence, file=sys.stderr, flush=True)
    words = launch_words()
    is_quiet = {"--quiet", "-q"} & set(words) and os.environ.get("WORLD_SIZE", "1") == "1"
    # Slurm ends what is left of a step; its job file says --quiet.
    if words and not is_quiet and "SLURM_JOB_ID" not in os.environ:
        words = ["sh", "-c", REPEAT, "sh", str(LAUNCHER), sentence]
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def refuse_lost_processes() -> None:
    """Raise ValueError where the launch asked for several processes and its file starts one, without a word."""
    words = launch_words()
    asked = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--num_processes", "--num-processes")]
    asked += [word.partition("=")[2] for word in words if word.startswith(("--num_processes=", "--num-processes="))]
    if asked and asked[-1].isdigit() and int(asked[-1]) > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        files = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config_file"]
        raise ValueError(
            f"--num_processes {asked[-1]}, but {files[-1] if files else 'this launch'} starts one process: launch with "
            "--config_file accelerate_configs/ddp.yaml"
        )


def run(
    main: Callable[[], object], *, errors: tuple[type[Exception], ...] = (ValueError,), stopped: str = STOPPED
) -> None:
    """Call `main` as a command: one of `errors` or OSError ends it with code 1 and a sentence, Ctrl-C and TERM with `stopped`.

    A second Ctrl-C ends it at once. Of several processes that fail alike one speaks.
    """
    name, before = Path(sys.argv[0]).name, {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, partial(_interrupt, owner=os.getpid()))
    try:
        refuse_lost_processes()
        with lost_loaders_named():
            main()
    except (OSError, *errors) as error:
        if not is_main_process():
            time.sleep(OTHERS)  # the launcher ends this process meanwhile, if the first one failed too
        say_last(f"{name}: {sentence(error)}")
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        if is_main_process():
            say_last(f"\n{name}: {stopped}")
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None, owner: int) -> None:
    if os.getpid() != owner and number == signal.SIGINT:
        return  # a process forked from the command: the command ends it
    signal.signal(number, signal.SIG_DFL)
    if os.getpid() != owner:
        os.kill(os.getpid(), number)
    raise KeyboardInterrupt(number)


def _press_again(ignored: "sys.UnraisableHookArgs") -> None:
    """A Ctrl-C that fell into a destructor or a weak reference's callback, where Python drops it: told once more."""
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    number = ignored.exc_value.args[0] if ignored.exc_value.args else signal.SIGINT
    if signal.getsignal(number) == signal.SIG_DFL:  # as _interrupt leaves it
        signal.signal(number, partial(_interrupt, owner=os.getpid()))
    threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()


def _parent_is_gone() -> bool:
    """Whether this is a process that reads for a command which has ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    parent.join(1.0)
    return not parent.is_alive()


def _without_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, ConnectionError) and _parent_is_gone():
        return  # the command was killed while this process handed it what it had read
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif is_main_process():
        print(f"\n{Path(sys.argv[0]).name}: {STOPPED}", file=sys.stderr)


def _without_trace_in_thread(ended: threading.ExceptHookArgs) -> None:
    # A full disk, say, in TensorBoard's writer, which tells the main thread too.
    if isinstance(ended.exc_value, OSError):
        print(f"{Path(sys.argv[0]).name}: {sentence(ended.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(ended)


sys.excepthook = _without_trace
threading.excepthook = _without_trace_in_thread
sys.unraisablehook = _press_again
known_warnings.silence()
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds: a log file takes a line for each state of a bar
