"""The points of a grid: which runs a sweep has, and the words that train one of them.

    python scripts/sweep.py scripts/train_llava.py ddp scripts/configs/llava_lora.yaml slurm/sweep_llava.yaml

A grid is YAML: keys of the recipe, each with a list of values; every combination is a run in a folder of its own below
the recipe's output_dir. Further flags go to every run. slurm/sweep.slurm trains them as a job array.
"""

import itertools
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from finetuning import command
from finetuning.flags import Parser
from finetuning.recipe_file import read_yaml, repeated_keys

LONGEST_NAME = 200  # of a folder; file systems take 255 bytes, and a lock beside it has a longer name


def read_grid(path: Path) -> list[dict[str, Any]]:
    """All combinations of a grid, the last key turning fastest. Raises ValueError for anything but keys with lists."""
    if not path.is_file():
        raise ValueError(f"{path}: no such grid")
    root = read_yaml(path)
    grid = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{path}: expected keys of the recipe with lists of values, such as lora_r: [16, 64]")
    if root is not None and (repeated := [*repeated_keys(path, root)]):
        raise ValueError("\n".join(repeated))
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def words_of(point: dict[str, Any], recipe: str, parent: str | None, flags: list[str]) -> list[str]:
    """RECIPE and flags that train one point, in a folder below `parent` (the recipe's output_dir) that is named by it."""
    words = [recipe, *flags]
    for key, value in point.items():
        words += [f"--{key}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    if parent is None:
        written = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        if not isinstance(written, dict) or "output_dir" not in written:
            raise ValueError(f"{recipe} says no output_dir: add it, or give --output_dir for all runs")
        parent = written["output_dir"]
    name = ",".join(f"{key}={as_name(value)}" for key, value in point.items())
    return [*words, "--output_dir", str(Path(parent) / name)]


def as_name(value: Any) -> str:
    """A value as part of a folder's name: no two values have the same, `a/b` is `a%2Fb`."""
    if isinstance(value, list):
        return f"[{','.join(map(as_name, value))}]"
    return quote(str(value), safe="+:@~")


def folder_problems(points: list[list[str]]) -> list[str]:
    """Points that would train in one folder, and folders whose names no file system takes."""
    folders = [words[-1] for words in points]
    problems = [
        f"points {folders.index(folder)} and {number} are the same run: {folder}"
        for number, folder in enumerate(folders)
        if folders.index(folder) < number
    ]
    longest = max(folders, key=lambda folder: len(Path(folder).name))
    if (length := len(Path(longest).name)) > LONGEST_NAME:
        problems.append(f"{longest}: a folder's name of {length} characters, at most {LONGEST_NAME} are possible")
    return problems


def main() -> None:
    """Print one point of the grid as words of a training command, or check every point. Raises ValueError with all mistakes."""
    parser = Parser(__doc__)
    parser.add_argument("script", help="training command, such as scripts/train_llava.py")
    parser.add_argument("strategy", help="file of accelerate_configs/, without .yaml")
    parser.add_argument("recipe", help="YAML of one run")
    parser.add_argument("grid", type=Path, help="YAML of keys and lists of values")
    parser.add_argument("--output_dir", help="folder of all runs; left out: the recipe's output_dir")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--count", action="store_true", help="check every point, print how many there are")
    wanted.add_argument("--point", type=int, help="print the words that train this point, one on a line")
    args, flags = parser.parse_known_args()
    points = [words_of(point, args.recipe, args.output_dir, flags) for point in read_grid(args.grid)]
    if args.point is not None:
        if not 0 <= args.point < len(points):
            raise ValueError(f"{args.grid} has points 0 to {len(points) - 1}, not {args.point}")
        print("\n".join([args.script, args.strategy, *points[args.point]]))
        return
    # Only here: a job that asks for its point should not wait for these imports.
    from finetuning.arguments import parse_arguments
    from finetuning.strategy import launch_problems

    problems = launch_problems(args.script, args.strategy) + folder_problems(points)
    for number, words in enumerate(points):
        try:
            parse_arguments(Path(args.recipe), ["--config", *words])
        except ValueError as error:
            problems.append(f"point {number}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    print(len(points) if args.count else "\n".join(f"{n}: {' '.join(words)}" for n, words in enumerate(points)))


if __name__ == "__main__":
    command.run(main)
