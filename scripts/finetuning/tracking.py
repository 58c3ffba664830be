"""TensorBoard always; W&B as well where the environment can reach it; one W&B run per training, however often restarted."""

import importlib.util
import netrc
import os
import secrets
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from transformers import Trainer


def wandb_is_set_up() -> bool:
    """Whether W&B can log without asking: a key in the environment or in ~/.netrc, or offline mode."""
    if importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_MODE") == "offline" or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def set_up(output_dir: str, run_name: str | None) -> list[str]:
    """What to report to. For W&B the run's id is kept in the folder, so that a restart continues the same run."""
    if not wandb_is_set_up():
        return ["tensorboard"]
    folder = Path(output_dir)
    id_file = folder / "wandb_run_id.txt"
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        os.environ.setdefault("WANDB_RUN_ID", id_file.read_text(encoding="utf-8").strip())
        os.environ.setdefault("WANDB_RESUME", "allow")
        os.environ.setdefault("WANDB_NAME", run_name or folder.name)
        os.environ.setdefault("WANDB_PROJECT", "llava-gemma-finetuning")
        os.environ.setdefault("WANDB_DIR", str(folder))
    return ["tensorboard", "wandb"]


def log_answers(trainer: Trainer, table: dict[str, list[Any]]) -> None:
    """The answers of an evaluation as a W&B table, pictures as pictures; main process only, nothing without W&B."""
    if "wandb" not in trainer.args.report_to:
        return
    import wandb

    columns = {
        name: [wandb.Image(value) if isinstance(value, Image.Image) else value for value in values]
        for name, values in table.items()
    }
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    wandb.log(
        {"eval/answers": wandb.Table(columns=list(columns), data=rows), "train/global_step": trainer.state.global_step}
    )
