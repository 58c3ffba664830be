"""The card of a merged model: data, recipe, metrics, proof, and the licence of the base."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finetuning.pages import markdown_table
from finetuning.run_folder import EVALUATION, evaluations, find_again, read_metrics

# Licence of a base by its model type, where its own card is not at hand. Names as the Hub spells them.
LICENCES = {"llava": "llama2", "gemma": "gemma"}
RECIPE_KEYS = [
    *("language_model", "projector", "vision_tower", "lora_r", "lora_alpha", "lora_dropout", "load_in_4bit"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "fp16", "bf16", "image_aspect_ratio", "seed"),
]


def licence_of(base: str) -> str | None:
    """The licence on the base's own card, else that of its model type; None if neither is known."""
    card = Path(base) / "README.md"
    if card.is_file():
        return ModelCard.load(card).data.license
    name = base.lower()
    return next((licence for kind, licence in LICENCES.items() if kind in name.rpartition("/")[2]), None)


def table(values: dict[str, Any]) -> str:
    """A Markdown table with a row for each key, or a sentence that there are none."""
    return markdown_table(["", ""], list(values.items())) if values else "None were recorded."


def in_one_line(verdict: dict[str, Any]) -> str:
    """A verdict of an evaluation, as metrics.json holds it: outcome, both models, and the best trivial answer."""
    text = f"{verdict['outcome']}: {verdict['base']:.2f} before, {verdict['tuned']:.2f} after {verdict['unit']}".strip()
    trivial = verdict.get("trivial")
    return f"{text}; {trivial['answer']}: {trivial['base']:.2f}" if trivial else text


def write_model_card(folder: Path, run: Path, arguments: dict[str, Any], report: dict[str, Any]) -> None:
    """Write `folder/README.md` from the run's files and the merge report."""
    base, licence = report["base_model"], licence_of(report["base_model"])
    data = Path(find_again(run, arguments["dataset_name"])) if "dataset_name" in arguments else None
    about_data = f"`{data.name}`" if data else "Not recorded."
    if data and (data / "manifest.json").is_file():
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        rows = ", ".join(f"{split} {count:,}" for split, count in manifest["rows"].items())
        about_data += f"; rows: {rows}. Split: {manifest['split_rule']}"
    metrics = {
        key: value for key, value in read_metrics(run).items() if key.startswith(("eval_", "train_loss", "global"))
    }
    for evaluated in evaluations(run):
        name = evaluated.parent.relative_to(run / EVALUATION)
        for verdict in json.loads(evaluated.read_text(encoding="utf-8")).get("verdict", []):
            metrics[f"{verdict['measure']}, {name}"] = in_one_line(verdict)
    merged, before = report["merged_against_tuned"], report["base_against_tuned"]
    header = ModelCardData(
        base_model=None if Path(base).exists() else base,
        license=licence,
        library_name="transformers",
        tags=["trl", "sft", "lora"],
    )
    text = f"""---
{header.to_yaml()}
---

# {folder.name.removesuffix(".unfinished")}

`{base}` (revision {report["base_revision"]}), fine-tuned with LoRA and merged in {report["dtype"]}.

## Data

{about_data}

## Recipe

{table({key: arguments[key] for key in RECIPE_KEYS if key in arguments})}

## Metrics

{table(metrics)}

## Proof of the merge

Against base + adapter on {len(report["answers"])} fixed questions: {merged["mean_kl"]:.2e} nats a token (tolerance
{report["tolerance"]["mean_kl"]:.0e}), {merged["equal_answers"]} equal greedy answers. The base alone is
{before["mean_kl"]:.2e} nats away. All numbers: `merge_report.json`.

## Licence

The licence of the base goes with these weights: {licence or "not known here, see the page of the base"}.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
