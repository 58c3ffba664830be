"""What folders of models and datasets say before anything is loaded. Standard library only: a wrong path is refused at once."""

import json
from pathlib import Path
from typing import Any

from finetuning.flags import nearest_path


def config_of(name: str) -> dict[str, Any] | None:
    """`config.json` of a model's folder; None where the Hub must be asked.

    Raises ValueError that says how to get what is missing.
    """
    looks_like_folder = name.startswith((".", "/", "~", "models/", "outputs/")) or Path(name).exists()
    if not looks_like_folder:
        return None
    config = Path(name) / "config.json"
    if not config.is_file() and Path(name).parts[:1] == ("outputs",):
        raise ValueError(
            f"{name}: no run here{nearest_path(name) or '.'} Training writes it; python scripts/status.py outputs/* lists "
            "those that are there"
        )
    if not config.is_file():
        raise ValueError(
            f"{name}: no model here (config.json is missing){nearest_path(name) or '.'} A tiny one to try things on: python "
            f"scripts/make_tiny_model.py --architecture llava --pretrain --output {name}; a real one: hf download "
            f"llava-hf/llava-1.5-7b-hf --local-dir {name}"
        )
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON ({error}): download the model again") from error


def refuse_missing_dataset(name: str | None, *, vision: bool) -> None:
    """Raise ValueError that says how to make it where `name` is a folder's and holds nothing."""
    if name is None:
        return
    folder = Path(name)
    looks_like_folder = folder.exists() or name.startswith((".", "/", "~", "data/"))
    if not looks_like_folder or (folder.is_dir() and any(folder.iterdir())):
        return
    example = (
        "prepare_cctv.py --frames FRAMES --labels labels.csv --messages messages.txt"
        if vision
        else "prepare_anime.py --csv anime-dataset-2023.csv"
    )
    raise ValueError(
        f"{name}: no dataset here{nearest_path(name) or '.'} Make it with: python data_prep/{example} --output {name}"
    )
