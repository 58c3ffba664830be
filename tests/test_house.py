"""Rules of the house that no linter knows: lengths, docstrings, and settings that are read by what they are for."""

import ast
import json
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT

from finetuning.arguments import dataclass_parser
from finetuning.command_line import FLAGS, list_flags
from finetuning.upstream import TESTED

LONGEST = {ast.FunctionDef: 80, ast.ClassDef: 250}  # lines
LEAST_DOCUMENTED = 0.95
# Folder of YAML files -> the test that reads each of them by what it is for.
READ_IN = {
    "accelerate_configs": "preflight/test_checks.py",
    "data_prep/anime": "data_prep/test_prepare_anime.py",
    "data_prep/preparing": "data_prep/test_prepare_anime.py",
    "scripts": "commands/test_doctor.py",
    "scripts/configs": "commands/test_train_llava.py",
    "slurm": "commands/test_slurm_files.py",
}


def project_files(suffix: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", f"*{suffix}"], cwd=ROOT, text=True, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.split() if (ROOT / name).is_file()]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef))


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods without an underscore in front."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from public_functions(node.body)


def test_functions_and_classes_are_short():
    too_long = [
        f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in project_files(".py")
        for node in definitions(path)
        if node.end_lineno - node.lineno + 1 > LONGEST[type(node)]
    ]
    assert not too_long


def test_public_functions_have_docstrings():
    functions = [
        (path, node)
        for path in project_files(".py")
        if not path.is_relative_to(ROOT / "tests")
        for node in public_functions(tree_of(path).body)
    ]
    missing = [f"{path.relative_to(ROOT)}: {node.name}" for path, node in functions if ast.get_docstring(node) is None]
    assert 1 - len(missing) / len(functions) >= LEAST_DOCUMENTED, missing


def test_every_yaml_file_lies_where_a_test_reads_it():
    folders = {str(path.parent.relative_to(ROOT)) for path in project_files(".yaml") if not path.name.startswith(".")}
    assert folders == READ_IN.keys()
    assert all((ROOT / "tests" / test).is_file() for test in READ_IN.values())


def test_flags_known_without_pytorch_are_those_of_the_dataclasses():
    versions = json.loads(FLAGS.read_text(encoding="utf-8"))["versions"]
    assert versions == {name: TESTED[name][0] for name in versions}
    if any(version(name) != pinned for name, pinned in versions.items()):
        pytest.skip("the flags are those of the pinned versions; with others the dataclasses are asked")
    known = list_flags(dataclass_parser(), versions)
    assert FLAGS.read_text("utf-8") == known, "a field has changed: PYTHONPATH=scripts python -m finetuning.arguments"
