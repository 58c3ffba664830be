"""Is everything in a folder as it was written? Reads every file of runs, checkpoints, datasets and merged models.

    python scripts/verify.py outputs/llava-lora
    python scripts/verify.py outputs/*/checkpoint-* models/llava-merged data/cctv

Compares each file's size and hash with the manifest that was written last. Of a run also its checkpoints and evaluations.
Exits with 1 when something is damaged or missing, or when there is nothing to compare with.
"""

import sys
from pathlib import Path

from finetuning import command
from finetuning.flags import Parser
from finetuning.manifest import MANIFEST, has_manifest, manifest_problems
from finetuning.run_folder import checkpoints, evaluations, read_metrics


def folders_of(folder: Path) -> list[Path]:
    """The folder itself, where it is finished, and checkpoints and evaluations in it. ValueError where there are none."""
    found = [*checkpoints(folder).values(), *(path.parent for path in evaluations(folder) if has_manifest(path.parent))]
    if has_manifest(folder) or read_metrics(folder) or not found:
        found.append(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return found


def describe(folder: Path) -> tuple[bool, str]:
    """(Whether all is as it was written, a line or more for people.)"""
    if not has_manifest(folder):
        return False, f"{folder}: no {MANIFEST}: written by an older version, or not whole"
    problems = manifest_problems(folder)
    if problems:
        return False, "\n".join([f"{folder}: damaged", *(f"  {problem}" for problem in problems)])
    return True, f"{folder}: whole"


def main() -> None:
    """Compare every file of the folders with their manifests; exit status 1 where one differs."""
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    all_whole = True
    for folder in args.folders:
        try:
            lines = [describe(part) for part in folders_of(folder)]
        except ValueError as error:
            lines = [(False, str(error))]
        for whole, line in lines:
            all_whole &= whole
            print(line)
    if not all_whole:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
