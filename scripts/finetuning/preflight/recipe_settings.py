"""A recipe and its flags, read without PyTorch: what a plan needs of them, and a stop at names that no recipe may have.

The training commands read the same by TRL's parser, which takes ten seconds to be imported.
"""

import ast
import difflib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from finetuning.recipe_file import read_yaml, repeated_keys

ARGUMENTS = Path(__file__).parents[1] / "arguments.py"
# Files of libraries whose dataclasses are a recipe's settings, beside our own.
DATACLASSES = {
    "trl": ("trainer/sft_config.py", "trainer/base_config.py", "trainer/model_config.py"),
    "transformers": ("training_args.py",),
}
# What is not said: defaults of those dataclasses, held to them by a test.
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": None, "model_revision": "main", "dtype": "auto", "attn_implementation": None,
    "load_in_4bit": False, "load_in_8bit": False, "use_bnb_nested_quant": False,
    "dataset_name": None, "dataset_train_split": "train", "dataset_validation_split": "validation",
    "language_model": "lora", "projector": "frozen", "vision_tower": "frozen", "share_image_prefix": None,
    "lora_r": 16, "lora_dropout": 0.05, "lora_target_modules": None, "use_dora": False, "fused_lora": True,
    "checkpoint_layers": "auto", "gradient_checkpointing": True, "base_precision": None, "cuda_graphs": False,
    "packing": False, "padding_free": False, "max_length": None, "chat_template_path": None,
    "global_batch_size": None, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0, "max_steps": -1, "optim": "adamw_torch_fused", "fp16": False, "bf16": None,
    "eval_strategy": "no", "eval_steps": None, "logging_steps": 10, "per_device_eval_batch_size": 8,
    "eval_answers": 64, "eval_max_new_tokens": 32, "output_dir": None,
}  # fmt: skip


@cache
def known_names() -> frozenset[str]:
    """Every setting that a recipe may have: fields of the dataclasses, read from their source."""
    files = [ARGUMENTS]
    for package, names in DATACLASSES.items():
        found = importlib.util.find_spec(package)
        folders = (found.submodule_search_locations or []) if found is not None else []
        files += [Path(folder) / name for folder in folders for name in names]
    names = {"config", "env"}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names |= {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
    return frozenset(names)


def read_settings(recipe: Path, flags: list[str]) -> dict[str, Any]:
    """Settings of a recipe, overridden by `--name value` flags, beside `DEFAULTS`. Raises ValueError that lists what is wrong."""
    if not recipe.is_file():
        raise ValueError(f"--config {recipe}: no such file")
    root = read_yaml(recipe)
    written = yaml.safe_load(recipe.read_text(encoding="utf-8-sig")) or {}
    if not isinstance(written, dict):
        raise ValueError(f"{recipe}: expected lines such as `learning_rate: 1.0e-4`, and found none")
    given, problems = read_flags(flags)
    if root is not None:
        problems += repeated_keys(recipe, root)
    problems += [name_problem(name, str(recipe)) for name in written if name not in known_names()]
    problems += [name_problem(name, f"--{name}") for name in given if name not in known_names()]
    settings = DEFAULTS | written | given
    problems += [problem for name in DEFAULTS if (problem := value_problem(name, settings[name]))]
    problems += [f"{name} is not set" for name in ("model_name_or_path", "dataset_name") if not settings[name]]
    if problems:
        raise ValueError("\n".join(problems))
    return settings


def read_flags(flags: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--name value`, `--name=value`, `--name` alone for true -> their values as YAML, and what is no flag."""
    given: dict[str, Any] = {}
    problems, name = [], None
    for word in flags:
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            given[name] = yaml.safe_load(value) if has_value else True
        elif name is None:
            problems.append(f"{word}: expected --name value")
        elif given[name] is True:
            given[name] = yaml.safe_load(word)
        else:  # one more of a list
            before = given[name]
            given[name] = [*before, word] if isinstance(before, list) else [before, word]
    return given, problems


def name_problem(name: str, where: str) -> str:
    """The sentence for a setting that there is not."""
    near = difflib.get_close_matches(name, known_names(), 1)
    return f"{where}: {name} is no setting" + (f"; did you mean {near[0]}?" if near else "")


def value_problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of one of `DEFAULTS`, by the type of its default."""
    default = DEFAULTS[name]
    if value is None or default is None or name == "checkpoint_layers":
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else f"{name}: {value} is not true or false"
    if isinstance(default, (int, float)):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = isinstance(default, int) and not isinstance(default, bool) and name != "max_steps"
        if not fits or (whole and value != int(value)):
            return f"{name}: {value} is not a {'whole ' if whole else ''}number"
        return None
    return None if isinstance(value, str) else f"{name}: {value} is not text"
