"""Fingerprints: one hash over names and contents of a model's or a dataset's files; what differs from a run's own.

Without PyTorch: commands hash a large base model while they import it (`hash_ahead`).
"""

import hashlib
import json
import multiprocessing
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from finetuning import run_folder
from finetuning.manifest import HASH, describe_files, described_files, has_manifest, manifest_problems

# Of a base model: weights, and what makes tokens and pixels of its inputs.
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja")
WORTH_A_PROCESS = 2**30  # bytes of weights; fewer are hashed in no time
# Of a dataset that was not prepared here: what `load_dataset` reads. The library keeps caches beside a saved dataset's files.
DATA_FILES = ("**/*.jsonl", "**/*.json", "**/*.parquet", "**/*.csv", "**/data-*.arrow")
WORDS = {
    "dataset": "the rows of --dataset_name",
    "mixture": "the rows of --dataset_mixer",
    "base": "the files of --model_name_or_path",
    "template": "the chat template",
}
_ahead: dict[Path, Connection] = {}  # folder of a model -> where its fingerprint comes from


def of_dataset(name: str) -> str | None:
    """The fingerprint of a dataset's folder: of a prepared one by its manifest, with which `open_dataset` compares all."""
    folder = Path(name)
    described = described_files(folder) if (folder / "dataset_dict.json").is_file() else None
    return _digest(described) if described is not None else of_folder(folder, DATA_FILES)


def of_mixture(mixer: Iterable[str]) -> str | None:
    """A hash over the sets that are mixed in, of those that are folders; None without any."""
    described = {name: of_dataset(name) for name in mixer}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest() if described else None


def of_folder(folder: Path, patterns: Iterable[str]) -> str | None:
    """A hash over names and contents of a folder's files; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return _digest(describe_files(folder, sorted({path for pattern in patterns for path in folder.glob(pattern)})))


def hash_ahead(name: str) -> None:
    """Begin to hash a model's folder in a process of its own; `of_model` waits for the result. Nothing for small models.

    For commands that import PyTorch next. Threads of this process would wait for its imports at every block they read.
    """
    folder = Path(name)
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) < WORTH_A_PROCESS:
        return
    fork = multiprocessing.get_context("fork")  # nothing large is imported yet
    receiver, sender = fork.Pipe(duplex=False)
    fork.Process(target=_send_model, args=(folder, sender), daemon=True).start()
    sender.close()
    _ahead[folder] = receiver


def of_model(name: str) -> str | None:
    """The fingerprint of a model's folder; None where there is no such folder."""
    receiver = _ahead.pop(Path(name), None)
    if receiver is not None:
        # Where the process did not get to its end, what stopped it will stop this one, too.
        with receiver, suppress(EOFError):
            return receiver.recv()
    return of_folder(Path(name), MODEL_FILES)


def _send_model(folder: Path, sender: Connection) -> None:
    with sender, suppress(OSError):  # told by of_model, which then reads the files itself
        sender.send(of_folder(folder, MODEL_FILES))


def _digest(described: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def changed_files(run: Path, base: str | None, dataset: str | None) -> list[str]:
    """What differs from the finished run: its own files, its base and its dataset, as far as they are folders here.

    `base` and `dataset` are left out where they are None.
    """
    found = manifest_problems(run) if has_manifest(run) else []
    kept, now = run_folder.read_begun_with(run).get(HASH, {}), {}
    if base and "base" in kept:
        now["base"] = of_model(base)
    if dataset and "dataset" in kept:
        now["dataset"] = of_dataset(dataset)
    return found + changes(run, {name: value for name, value in now.items() if value})


def changes(folder: Path, found: dict[str, str]) -> list[str]:
    """What differs from what the run in `folder` was begun with, for people; empty for runs that kept nothing."""
    kept = run_folder.read_begun_with(folder).get(HASH, {})
    return [
        f"{WORDS[name]} ({kept[name][:12]} -> {value[:12]})"
        for name, value in found.items()
        if name in kept and kept[name] != value
    ]
