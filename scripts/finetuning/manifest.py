"""The files of a finished folder with size and hash: written last, compared before the folder is used again.

A checkpoint, a finished run, a merged model and a prepared dataset have one. XXH3 (128 bits) finds damage, not forgery:
who can change a file can change the manifest. It reads as fast as memory does, five to ten times as fast as SHA-256.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from finetuning.run_folder import read_json, write_json

MANIFEST = "manifest.json"
THREADS = 8  # that hash, each a file: a checkpoint's large files are two or more
HASH = "xxh3_128"
SEAL = "xxh3_128_of_the_rest"
HASHES: dict[str, Callable[[], Any]] = {HASH: xxhash.xxh3_128, "sha256": hashlib.sha256}  # older manifests have SHA-256


def describe_file(path: Path, algorithm: str = HASH) -> dict[str, Any]:
    """`{"size", "xxh3_128"}` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, HASHES[algorithm]).hexdigest()
    return {"size": path.stat().st_size, algorithm: digest}


def describe_files(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Name below `folder` -> `describe_file` of each path."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip([str(path.relative_to(folder)) for path in paths], pool.map(describe_file, paths), strict=True))


def files_in(folder: Path) -> list[Path]:
    """All files below a folder but the manifest itself."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def write_manifest(folder: Path, paths: Iterable[Path] | None = None, facts: Mapping[str, Any] | None = None) -> None:
    """Describe these files of a folder, or all of them, in its manifest, beside `facts`; the last write in it."""
    paths = files_in(folder) if paths is None else sorted(paths)
    contents = json.loads(json.dumps({**(facts or {}), "files": describe_files(folder, paths)}))
    write_json(folder / MANIFEST, contents | {SEAL: _seal(contents)})


def write_manifest_while_syncing(folder: Path) -> None:
    """`write_manifest`, and all of the folder on the disk: files are hashed while the disk takes them."""
    paths = [*folder.rglob("*"), folder]
    with ThreadPoolExecutor(1) as pool:
        syncing = pool.submit(sync, paths)
        write_manifest(folder)
        syncing.result()
    sync([folder / MANIFEST, folder])


def sync(paths: Iterable[Path]) -> None:
    """Wait until files, and names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def has_manifest(folder: Path) -> bool:
    """Whether a folder has one: those of older versions do not."""
    return (folder / MANIFEST).is_file()


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest that was written here, and not another file of that name."""
    try:
        return SEAL in read_json(folder / MANIFEST, "")
    except ValueError:
        return False


def described_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Name -> size and hash, as the manifest says; None where it is missing or of a version that described no files.

    Raises ValueError for a damaged one.
    """
    contents = read_json(folder / MANIFEST, "Restore it from a copy, or make the folder anew")
    if SEAL in contents and contents.pop(SEAL) != _seal(contents):
        raise ValueError(f"{folder / MANIFEST}: damaged (changed since it was written). Make the folder anew")
    files = contents.get("files")
    if files is None:
        return None
    if not isinstance(files, dict) or any(_hash_of(described) not in HASHES for described in files.values()):
        raise ValueError(f"{folder / MANIFEST}: damaged (no sizes and hashes under files). Make the folder anew")
    return files


def manifest_problems(folder: Path) -> list[str]:
    """What differs from the manifest, file by file; empty when nothing does. Sizes are compared before all is read."""
    try:
        files = described_files(folder)
    except ValueError as error:
        return [f"{MANIFEST}: {str(error).rpartition('damaged ')[2].partition('). ')[0]})"]
    if files is None:
        return [f"{MANIFEST}: describes no files"]
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
        found = pool.map(lambda name: describe_file(folder / name, _hash_of(files[name])), to_read)
        changed = [name for name, now in zip(to_read, found, strict=True) if now != files[name]]
    return [f"{name}: changed since it was written" for name in changed]


def _seal(contents: Mapping[str, Any]) -> str:
    """Hash of a manifest's own contents: it says of each file what was written, and of itself too."""
    return xxhash.xxh3_128_hexdigest(json.dumps(contents, sort_keys=True).encode())


def _hash_of(described: Any) -> str:
    """`xxh3_128` of `{"size", "xxh3_128"}`; "" for anything else."""
    names = set(described) if isinstance(described, dict) else set()
    return names.difference({"size"}).pop() if "size" in names and len(names) == 2 else ""


@contextmanager
def made_whole(output: Path, *, described: bool = True) -> Iterator[Path]:
    """An empty folder beside `output`, which becomes it at the end; nothing stays where the block raises.

    With its manifest, unless what is in it may be changed afterwards (`described=False`).
    """
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        follow_umask(files_in(unfinished))
        if described:
            write_manifest(unfinished)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def follow_umask(paths: Iterable[Path]) -> None:
    """Let files be read by whom the umask allows: safetensors makes them for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        wanted = 0o666 & ~umask
        if stat.S_IMODE(path.stat().st_mode) != wanted:
            path.chmod(wanted)
