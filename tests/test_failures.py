"""What goes wrong outside of a command is one sentence, and harmless on a terminal."""

import csv
import errno
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from finetuning.failures import harmless, sentence, writing
from preparing.ledger import Ledger

LOADER = """Caught ValueError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in loop
ValueError: the first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
ValueError: row 3, picture 1: it does not decode
"""


def test_errors_of_the_system_name_their_file_and_a_remedy(tmp_path):
    path = tmp_path / "state.json"
    with pytest.raises(OSError, match="state") as error, writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert sentence(error.value) == f"{path}: no space left on device. Free space, or inodes (df -i), on that disk"
    with pytest.raises(OSError, match="state") as error, writing(path):
        raise RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/0")
    assert sentence(error.value).startswith(f"{path}: cannot be written")
    with pytest.raises(OSError, match="state") as error, writing(path):
        Tokenizer(BPE()).save(str(tmp_path / "no folder" / "tokenizer.json"))  # an Exception without a class of its own
    assert sentence(error.value) == f"{path}: no such file or directory"
    for mistake in (RuntimeError("a mistake"), Exception("a mistake")):
        with pytest.raises(type(mistake), match="a mistake"), writing(path):
            raise mistake


def test_a_loader_process_says_what_its_row_said_without_its_trace():
    assert sentence(ValueError(LOADER)).strip() == "row 3, picture 1: it does not decode"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ValueError('no such file')", "-c: no such file\n"),
        ("RuntimeError('DataLoader worker (pid 71) is killed by signal: Killed. Rerun with')", "was ended by Killed"),
        ("RuntimeError('DataLoader worker (pid(s) 7, 9) exited unexpectedly')", "(7, 9) was ended by itself"),
        ("KeyError('a mistake')", "Traceback"),
    ],
)
def test_a_command_ends_in_a_sentence_and_a_mistake_of_its_own_in_a_trace(raised, said):
    code = f"from finetuning import command\ndef main():\n    raise {raised}\ncommand.run(main)"
    ended = subprocess.run([sys.executable, "-c", code], cwd="scripts", capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and said in ended.stderr
    assert ("Traceback" in ended.stderr) == (said == "Traceback")


def test_names_steer_no_terminal_and_cells_compute_nothing_in_excel(tmp_path):
    assert harmless("a\x1b[2Jb\x07\x9b\ttab\n한") == "a\\x1b[2Jb\\x07\\x9b\ttab\n한"
    ledger = Ledger()
    names = ["=HYPERLINK(1)", "+1", "-a.jpg", "@SUM", "\tx", "plain=1", "a\x1b[2J.jpg"]
    for name in names:
        ledger.read("frames")
        ledger.reject("frames", name, 3, "bad", "=1+1")
    assert "\x1b" not in ledger.table() and "=HYPERLINK" in ledger.table()
    ledger.write_csv(tmp_path / "rejects.csv")
    with (tmp_path / "rejects.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"'{name}" for name in names[:5]] + names[5:]
    assert {row["detail"] for row in rows} == {"'=1+1"} and {row["line"] for row in rows} == {"3"}
