"""A recipe's YAML, read for its mistakes: each is said with its line, before a parser stumbles over it."""

import argparse
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetuning.flags import NO_SECRETS, SECRET

# Settings that are text because they take words, and take numbers as well.
NUMBERS_TOO = ("checkpoint_layers",)
# YAML reads 010 as 8, and 1:30 as 90.
OTHER_BASE = re.compile(r"[-+]?0[0-7_]+$|[-+]?\d+:")


def refuse_bad_recipe(path: Path, parser: argparse.ArgumentParser) -> None:
    """Raises ValueError that lists what is wrong with the recipe, by line: its form, its keys, the types of its values."""
    root = read_yaml(path)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines such as `learning_rate: 1.0e-4`, and found none")
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # the first of a name: a flag's `--no_...` twin takes no value
        actions.setdefault(action.dest, action)
    problems = [*repeated_keys(path, root)]
    try:
        values = yaml.constructor.SafeConstructor().construct_document(root)
    except yaml.MarkedYAMLError as error:  # !!python/object and its like
        raise ValueError(
            f"{path}:{error.problem_mark.line + 1} is not YAML of plain values: {error.problem}; expected `key: value`"
        ) from error
    for key_node, value_node in root.value:
        where, key = f"{path}:{key_node.start_mark.line + 1}", str(key_node.value)
        if key == "env":
            secret = (
                [name for name in values["env"] if SECRET.search(str(name))] if isinstance(values["env"], dict) else []
            )
            problems += [f"{where}: env: {', '.join(secret)}: {NO_SECRETS}"] if secret else []
            continue
        if key not in actions:
            near = difflib.get_close_matches(key, actions, 1)
            problems.append(f"{where}: {key} is no setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif problem := value_problem(actions[key], values[key_node.value], value_node):
            problems.append(f"{where}: {key}: {problem}")
    if problems:
        raise ValueError("\n".join(problems))


def read_yaml(path: Path) -> yaml.Node | None:
    """The file's nodes, which know their lines. Raises ValueError with file, line and remedy."""
    try:
        return yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line} is not UTF-8 (Korean Windows saves CP949): save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        if "\\t" in str(error.problem):
            raise ValueError(f"{path}:{line} begins with a tab, which YAML does not allow: use spaces") from error
        raise ValueError(f"{path}:{line} is not YAML: {error.problem}; expected `key: value`") from error
    except yaml.YAMLError as error:  # characters that no YAML may hold
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def repeated_keys(path: Path, node: yaml.Node) -> Iterator[str]:
    """What YAML takes in silence: of a key that stands twice the last value counts."""
    lines: dict[str, int] = {}
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            yield f"{path}:{line}: {key} stands in line {lines[key]} already: leave the one that is meant"
        lines.setdefault(key, line)
        yield from repeated_keys(path, value_node)


def value_problem(action: argparse.Action, value: Any, node: yaml.Node) -> str | None:
    """What is wrong with a setting's value for the flag of the same name; None where nothing is."""
    if value is None:
        return None
    if isinstance(value, list):
        if action.nargs not in ("+", "*"):
            return f"expected one value, got a list of {len(value)}"
        found = (value_problem_of_one(action, one, inner) for one, inner in zip(value, node.value, strict=True))
        return next(filter(None, found), None)
    return (
        None
        if isinstance(value, dict) and action.type not in (int, float)
        else value_problem_of_one(action, value, node)
    )


def value_problem_of_one(action: argparse.Action, value: Any, node: yaml.Node) -> str | None:
    """What is wrong with one value, which is no list."""
    written = str(node.value if isinstance(node, yaml.ScalarNode) else value)
    is_flag = getattr(action.type, "__name__", "") == "string_to_bool"
    takes_text = action.type is str or action.choices
    expected = (
        "text" if takes_text else "true or false" if is_flag else "a whole number" if action.type is int else "a number"
    )
    if isinstance(value, int) and not isinstance(value, bool) and OTHER_BASE.match(written):
        return f"{written} is read as {value}: write the number that is meant without a 0 or a colon"
    if isinstance(value, bool) and takes_text:
        none = ["none"] if action.dest == "report_to" and not value else []  # what its readers call no tracker
        words = list(map(str, action.choices or none or [written]))
        word = written if written in words else "no" if "no" in words and not value else words[0]
        expected = f"expected one of {', '.join(words)}: " if action.choices else ""
        return f'{written} means {str(value).lower()} in YAML, {expected}write "{word}" in quotes'
    if action.choices and value not in action.choices and str(value) not in map(str, action.choices):
        near = difflib.get_close_matches(str(value), map(str, action.choices), 1)
        words = ", ".join(map(str, action.choices))
        return f"{written} is not one of {words}" + (f"; did you mean {near[0]}?" if near else "")
    if action.type is str and not isinstance(value, (str, dict)) and action.dest not in NUMBERS_TOO:
        return f'{written} is read as {type(value).__name__}, expected text: write "{written}" in quotes'
    if takes_text or action.type is None:
        return None
    if isinstance(value, bool) and not is_flag:
        return f"{written} means {str(value).lower()} in YAML, expected {expected}"
    try:
        action.type(written)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        whole = isinstance(value, float) and value.is_integer() and not is_flag
        return f"{written} is not {expected}" + (f": write {int(value)}" if whole else "")
    return None
