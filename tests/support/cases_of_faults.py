"""A command under faults: its words, and what it must leave however it came to its end."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from datasets import load_from_disk

from finetuning.data.dataset import describe_damage
from support.training import SAMPLE


@dataclass(frozen=True)
class Case:
    """A command: its words for a folder that it writes in, and what of that folder must be the same however it came."""

    words: Callable[[Path], list[str | Path]]
    result: Callable[[Path], dict[str, object]]
    before: Callable[[Path], object] = Path.mkdir  # what the folder holds when it begins


def train_words(kind: str, model: Path, dataset: Path, run: Path, **flags: object) -> list[str | Path]:
    """A training of four steps with a checkpoint of each."""
    recipe = SAMPLE if kind == "llava" else ROOT / "scripts" / "configs" / "gemma_sample.yaml"
    flags = {
        **{"model_name_or_path": model, "dataset_name": dataset, "output_dir": run, "max_steps": 4, "logging_steps": 1},
        **{"per_device_train_batch_size": 4, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 1},
        **{"save_total_limit": 2, "load_best_model_at_end": "false", "report_to": "none", **flags},
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    return [f"scripts/train_{kind}.py", "--config", recipe, *words]


def contents(*names: str) -> Callable[[Path], dict[str, object]]:
    """`Case.result`: the bytes of the files with these names or patterns below a folder; there is at least one of each."""

    def read(folder: Path) -> dict[str, object]:
        found = {name: sorted(folder.glob(name)) for name in names}
        assert all(found.values()), found
        return {str(path.relative_to(folder)): path.read_bytes() for paths in found.values() for path in paths}

    return read


def rows_of(name: str) -> Callable[[Path], dict[str, object]]:
    """`Case.result`: all rows of a prepared dataset, which its manifest finds whole, and its rejects.

    Not the files themselves: the library writes a number of its own into those of some datasets.
    """

    def read(folder: Path) -> dict[str, object]:
        assert describe_damage(folder / name) is None
        rows = {split: of_split.to_list() for split, of_split in load_from_disk(str(folder / name)).items()}
        return rows | {"rejects": (folder / name / "rejects.csv").read_bytes()}

    return read


def of_training(name: str) -> Callable[[Path], dict[str, object]]:
    """`Case.result` of the run with this name: weights, and the true numbers of the whole training."""

    def read(folder: Path) -> dict[str, object]:
        metrics = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
        assert not (folder / name / "unfinished").exists() and metrics["global_step"] == 4
        return contents(f"{name}/*model.safetensors")(folder) | {"train_loss": round(metrics["train_loss"], 5)}

    return read


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
