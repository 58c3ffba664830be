#!/usr/bin/env bash
# One would guess: a text read from a column by its row number costs the same, however long the table is.
# Seen: each reading selects the column anew, piece by piece: in a table of 800 pieces (pictures are written in pieces of
#       100 rows) it costs many times what it costs in one of 8. A loop over all rows grows with the square of their number.
#       `column[:]` reads all at once.
# Versions: datasets 5.2.0. Python 3.11.
# Source: https://huggingface.co/docs/datasets/access
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile datasets==5.2.0
cd "$folder"
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HOME="$folder/home"
"$folder/venv/bin/python" - <<'PYTHON'
import time
from importlib.metadata import version

from datasets import Dataset

print(f"datasets {version('datasets')}")


def texts(rows):
    for row in range(rows):
        yield {"text": f"question {row}", "number": row}


def cost(rows: int) -> float:
    """CPU microseconds of reading one text."""
    dataset = Dataset.from_generator(texts, gen_kwargs={"rows": rows}, writer_batch_size=100)
    column = dataset["text"]
    started = time.process_time()
    for row in range(300):
        assert column[row] == f"question {row}"
    each = (time.process_time() - started) / 300 * 1e6
    started = time.process_time()
    assert len(column[:]) == rows
    at_once = (time.process_time() - started) / rows * 1e6
    pieces = dataset.data.column("text").num_chunks
    print(f"{rows} rows in {pieces} pieces: {each:.0f} microseconds by row, {at_once:.1f} a row at once")
    return each


assert cost(80_000) > 3 * cost(800)
PYTHON
