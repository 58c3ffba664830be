"""What it costs to describe a checkpoint's files, and to compare them before a run continues.

    python benchmarks/verify_speed.py --folder outputs/verify-speed

Writes files as large as those of a 7B model's adapter (LoRA r 64 on all layers, fp32, and AdamW's two moments), as
training does: written, put on disk with and without their hashes, and compared. Prints seconds and GB/s.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from finetuning.manifest import HASH, manifest_problems, sync, write_manifest_while_syncing

WEIGHTS = 159_907_840  # of LoRA r 64 on all linear layers of Llama-7B
FILES = {"adapter_model.safetensors": 4 * WEIGHTS, "optimizer.pt": 8 * WEIGHTS}  # bytes
PIECE = 1 << 24
CONTENTS = os.urandom(PIECE)


def write(folder: Path) -> None:
    """The files, as a save leaves them: in memory, on their way to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, size in FILES.items():
        with (folder / name).open("wb") as file:
            for start in range(0, size, PIECE):
                file.write(CONTENTS[: size - start])


def main(folder: Path, times: int) -> None:
    """Write files to `folder`, compare them `times` times with their manifest, and print seconds and GB/s."""
    if folder.exists():
        sys.exit(f"verify_speed.py: {folder} exists: name a folder that does not")
    acts = {
        "put on disk": lambda: sync([*folder.iterdir(), folder]),
        f"the same, and described ({HASH})": lambda: write_manifest_while_syncing(folder),
        "compared": lambda: manifest_problems(folder),
    }
    seconds: dict[str, list[float]] = {what: [] for what in ("written", *acts)}
    try:
        for _ in range(times):
            for what, act in acts.items():
                if what != "compared":
                    started = time.perf_counter()
                    write(folder)
                    seconds["written"].append(time.perf_counter() - started)
                started = time.perf_counter()
                act()
                seconds[what].append(time.perf_counter() - started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(FILES.values())
    for what, taken in seconds.items():
        each = ", ".join(f"{one:.2f}" for one in taken)
        print(f"{what}: {statistics.median(taken):.2f} s, {size / statistics.median(taken) / 1e9:.2f} GB/s ({each})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder to make, on the disk that is measured")
    parser.add_argument("--times", type=int, default=3, help="how often everything is done (default %(default)s)")
    options = parser.parse_args()
    main(options.folder, options.times)
