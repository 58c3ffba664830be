"""What folders of models and datasets say before anything is loaded. Standard library only: a wrong path is refused at once."""

import json
from pathlib import Path
from typing import Any

from finetuning.run_folder import adapter_base


def config_of(name: str) -> dict[str, Any] | None:
    """`config.json` of a model's folder, of a run's base where there is an adapter; None where the Hub must be asked.

    Raises ValueError that says how to get what is missing.
    """
    base = adapter_base(Path(name)) or name
    looks_like_folder = base.startswith((".", "/", "~", "models/", "outputs/")) or Path(base).exists()
    if not looks_like_folder:
        return None
    config = Path(base) / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{base}: no model here (config.json is missing). A tiny one to try things on: python "
            f"scripts/make_tiny_model.py --architecture llava --pretrain --output {base}; a real one: hf download "
            f"llava-hf/llava-1.5-7b-hf --local-dir {base}"
        )
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config}: damaged ({error}). Copy or download the model again") from error


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
    raise ValueError(f"{name}: no dataset here. Make it with: python data_prep/{example} --output {name}")
