"""The files of a finished folder with size and SHA-256: written last, compared before the folder is used again.

A checkpoint, a finished run and a merged model have one. Standard library only.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetuning.run_folder import read_json, write_json

MANIFEST = "manifest.json"
THREADS = 8  # that hash, each a file: one core does 1 to 2 GB/s, a checkpoint's large files are two or more


def describe_file(path: Path) -> dict[str, Any]:
    """`{"size", "sha256"}` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def describe_files(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name below `folder` -> `describe_file` of each path."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip([str(path.relative_to(folder)) for path in paths], pool.map(describe_file, paths), strict=True))


def files_in(folder: Path) -> list[Path]:
    """All files below a folder but the manifest itself."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def write_manifest(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Describe these files of a folder, or all of them, in its manifest; the last write in it."""
    paths = files_in(folder) if paths is None else sorted(paths)
    write_json(folder / MANIFEST, {"files": describe_files(folder, paths)})


def has_manifest(folder: Path) -> bool:
    """Whether a folder has one: those of older versions do not."""
    return (folder / MANIFEST).is_file()


def manifest_problems(folder: Path) -> list[str]:
    """What differs from the manifest, file by file; empty when nothing does. Sizes are compared before all is read."""
    try:
        files = read_json(folder / MANIFEST, "").get("files", {})
    except ValueError as error:
        return [f"{MANIFEST}: {str(error).rpartition('damaged ')[2].rstrip('. ')}"]
    problems, to_read = [], []
    for name, described in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != described["size"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, {described['size']} were written")
        else:
            to_read.append(name)
    if problems:
        return problems
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(describe_file, [folder / name for name in to_read])
        changed = [name for name, now in zip(to_read, found, strict=True) if now != files[name]]
    return [f"{name}: changed since it was written" for name in changed]


def follow_umask(paths: Iterable[Path]) -> None:
    """Let files be read by whom the umask allows: safetensors makes them for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        wanted = 0o666 & ~umask
        if stat.S_IMODE(path.stat().st_mode) != wanted:
            path.chmod(wanted)
