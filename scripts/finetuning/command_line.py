"""The words of a training command: recipe, flags and folders, checked before PyTorch is imported, which takes seconds.

The flags are the fields of the dataclasses in `arguments.py`, most of them TRL's. `recipe_flags.json` lists them as they
are in the pinned versions, so that nothing need be imported to know them; with other versions they are asked.
"""

import argparse
import ast
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from finetuning.flags import NO_SECRETS, SECRET, did_you_mean, nearest_path
from finetuning.model_files import config_of, refuse_missing_dataset
from finetuning.recipe_file import refuse_bad_recipe

FLAGS = Path(__file__).with_name("recipe_flags.json")
# Fields of TRL's dataclasses that these scripts decide elsewhere: set, they would be ignored, which is worse than an error.
DECIDED_ELSEWHERE = {
    "use_peft": "language_model, projector and vision_tower say what is lora",
    "lora_modules_to_save": "set the part to full instead",
    "lora_target_parameters": "lora_target_modules names the layers",
    "model_init_kwargs": "model_name_or_path, dtype and attn_implementation are flags of their own",
    "trust_remote_code": "only model classes that transformers ships are loaded",
    "resume_from_checkpoint": "the same command continues a run from its newest whole checkpoint",
    "deepspeed": "accelerate launch --config_file accelerate_configs/... says how the work is divided",
    "fsdp": "accelerate launch --config_file accelerate_configs/... says how the work is divided",
    "eos_token": "the model's own is used",
    "pad_token": "the model's own is used",
}
# What counts things, or measures them: the least that means something, and whether that itself does.
LEAST = {
    "lora_r": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "global_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_length": 1, "image_max_tiles": 1, "logging_steps": 0, "eval_steps": 0, "save_steps": 0,
    "warmup_steps": 0, "weight_decay": 0, "lora_dropout": 0, "seed": 0,
}  # fmt: skip
MORE_THAN = {"learning_rate": 0, "lora_alpha": 0}
LESS_THAN = {"lora_dropout": 1}


def out_of_bounds(settings: argparse.Namespace) -> list[str]:
    """A sentence for every number that no training can have: rank 0, a batch of no rows, a negative learning rate."""
    bounds = (
        (LEAST, lambda value, bound: value >= bound, "at least"),
        (MORE_THAN, lambda value, bound: value > bound, "more than"),
        (LESS_THAN, lambda value, bound: value < bound, "less than"),
    )
    return [
        f"{name}: {value} is out of bounds: expected {words} {bound}"
        for limits, holds, words in bounds
        for name, bound in limits.items()
        if isinstance(value := getattr(settings, name, None), int | float) and not holds(value, bound)
    ]


def own_settings() -> set[str]:
    """Names of the settings that arguments.py adds to TRL's: read in its source, not imported."""
    tree = ast.parse(Path(__file__).with_name("arguments.py").read_text(encoding="utf-8"))
    fields = (item for node in tree.body if isinstance(node, ast.ClassDef) for item in node.body)
    return {
        field.target.id for field in fields if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


class Parser(argparse.ArgumentParser):
    """Mistakes are ValueErrors: a usage of 180 flags would hide what is wrong. Help begins with the project's own settings."""

    def format_help(self) -> str:
        """All settings in three groups: the project's, those of its recipes, the rest."""
        recipes = (Path(__file__).parent.parent / "configs").glob("*.yaml")
        used = {key for path in recipes for key in yaml.safe_load(path.read_text(encoding="utf-8"))}
        ours = own_settings() | {"help", "config"}
        groups: dict[str, list[argparse.Action]] = {
            "settings of this project": [],
            "settings of TRL and transformers that its recipes use": [],
            "all other settings of TRL and transformers": [],
        }
        first, second, third = groups.values()
        for action in self._actions:
            (first if action.dest in ours else second if action.dest in used else third).append(action)
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        formatter.add_text("A recipe's keys and these flags are the same settings; a flag overrides the recipe.")
        for title, actions in groups.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's sentence."""
        raise ValueError(message)


def string_to_bool(text: str) -> bool:
    """`true`, `yes`, `1` and `false`, `no`, `0`, in any case, as transformers reads them."""
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return words[text.lower()]


TYPES = {"int": int, "float": float, "string_to_bool": string_to_bool}


def list_flags(parser: argparse.ArgumentParser, versions: dict[str, str]) -> str:
    """What `recipe_flags.json` holds: the flags of `parser`, and the versions of the libraries that define them."""
    flags = []
    for action in parser._actions[1:]:  # the first is --help
        flag = {key: getattr(action, key) for key in ("option_strings", "dest", "nargs", "const", "default", "help")}
        flag["type"] = getattr(action.type, "__name__", None)
        flag["choices"] = list(action.choices) if action.choices else None
        flags.append({key: value for key, value in flag.items() if value is not None} | {"required": action.required})
    lines = ",\n".join(json.dumps(flag, ensure_ascii=False) for flag in flags)
    return f'{{"versions": {json.dumps(versions)},\n"flags": [\n{lines}\n]}}\n'


def flag_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser with every flag of a training command, without PyTorch where the installed versions are the pinned ones."""
    known = json.loads(FLAGS.read_text(encoding="utf-8"))
    if any(version(name) != pinned for name, pinned in known["versions"].items()):
        from finetuning.arguments import dataclass_parser

        known = json.loads(list_flags(dataclass_parser(), known["versions"]))
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="the recipe; flags of the same names override it")
    for flag in known["flags"]:
        names, kind = flag.pop("option_strings"), flag.pop("type", None)
        if flag.get("nargs") == 0:
            parser.add_argument(*names, action="store_false", dest=flag["dest"], help=flag.get("help"))
        else:
            parser.add_argument(*names, type=TYPES.get(kind, str), **flag)
    return parser


def read_command(
    default_recipe: Path, argv: list[str], description: str | None = None
) -> tuple[list[str], argparse.Namespace]:
    """(`argv` with `--config` and its file as two words, the values of the recipe with the flags over them).

    Values are as written, before the dataclasses derive others from them. Raises ValueError with all that is wrong.
    """
    argv = [part for word in argv for part in split_config_flag(word)]
    parser = flag_parser(description)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        sys.exit()
    if "--config" not in argv:
        argv = ["--config", str(default_recipe), *argv]
    recipe = Path(argv[argv.index("--config") + 1]) if argv[-1] != "--config" else None
    if recipe is None or not recipe.is_file():
        names = sorted(path.name for path in default_recipe.parent.glob("*.yaml"))
        folder = os.path.relpath(default_recipe.parent)
        near = recipe and (nearest_path(recipe) or did_you_mean(recipe.name, names).replace("mean ", f"mean {folder}/"))
        raise ValueError(
            f"--config {recipe or ''}: no such file{near or '.'} Recipes that come with the project, in {folder}: "
            f"{', '.join(names)}"
        )
    refuse_bad_recipe(recipe, parser)
    written = yaml.safe_load(recipe.read_text(encoding="utf-8-sig"))
    parser.set_defaults(**{key: value for key, value in written.items() if key != "env"})
    for action in parser._actions:
        action.required = action.required and action.dest not in written
    settings, unknown = parser.parse_known_args(argv)
    problems = [unknown_flag(word, parser) for word in unknown if word.startswith("-")]
    if any(SECRET.search(word.partition("=")[0]) for word in unknown):
        problems.append(NO_SECRETS)
    if unknown and not problems:
        problems.append(f"{' '.join(unknown)}: belongs to no flag")
    problems += [
        f"{key} has no effect here: {reason}"
        for key, reason in DECIDED_ELSEWHERE.items()
        if getattr(settings, key, None)
    ]
    if settings.hub_token:
        problems.append(f"hub_token: {NO_SECRETS}")
    if not settings.model_name_or_path:
        problems.append("model_name_or_path is not set: expected a folder, or a model's name on the Hub")
    problems += out_of_bounds(settings)
    if both_asked_for(argv, written, settings):
        problems.append(
            f"max_steps: {settings.max_steps} and num_train_epochs: {settings.num_train_epochs} say both how long to train, "
            "and the epochs would be ignored: remove num_train_epochs, or set max_steps: -1"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return argv, settings


def refuse_wrong_command(default_recipe: Path, description: str, *, vision: bool) -> str:
    """The name of the base model. Raises ValueError with all that is wrong with a training command's words, data and base.

    `--help` ends the command here.
    """
    _, settings = read_command(default_recipe, sys.argv[1:], description)
    problems = []
    for look in (
        lambda: refuse_missing_dataset(settings.dataset_name, vision=vision),
        lambda: config_of(settings.model_name_or_path),
    ):
        try:
            look()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return settings.model_name_or_path


def unknown_flag(word: str, parser: argparse.ArgumentParser) -> str:
    """What is said of a flag that there is not, with the one that is nearest."""
    name = word.partition("=")[0]
    return f"{name} is no flag{did_you_mean(name, parser._option_string_actions)}"


def both_asked_for(argv: list[str], written: dict[str, Any], settings: argparse.Namespace) -> bool:
    """Whether steps and epochs are given at once: both as flags, both in the recipe, or epochs as a flag over its steps.

    Steps as a flag override the epochs of a recipe, as every flag does.
    """
    flags = {word.partition("=")[0] for word in argv}
    epochs = "--num_train_epochs" in flags or ("num_train_epochs" in written and "--max_steps" not in flags)
    return settings.max_steps > 0 and epochs


def split_config_flag(word: str) -> list[str]:
    """`--config=FILE` -> `--config`, `FILE`; any other word as it is."""
    # TrlParser knows `--config FILE` only, and would otherwise ignore the recipe without a word.
    return word.split("=", 1) if word.startswith("--config=") else [word]


def parse_mixer(given: dict | str | None, own: str) -> dict[str, float] | None:
    """`dataset_mixer` as set -> weight. Raises ValueError, all reasons together, for what is none."""
    try:
        mixer = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(
            f'dataset_mixer: {given} is not JSON ({error}), expected such as {{"data/general": 0.2}}'
        ) from error
    if mixer is None:
        return None
    if not isinstance(mixer, dict):
        raise ValueError(f'dataset_mixer: {given}, expected names and weights, such as {{"data/general": 0.2}}')
    problems = [
        f"the weight of {name} is {weight}, expected a number above 0"
        for name, weight in mixer.items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0
    ]
    if own in mixer:
        problems.append(f"{own} is dataset_name itself: name other sets only")
    if problems:
        raise ValueError("dataset_mixer: " + "; ".join(problems))
    return mixer
