"""The card (README.md) of a run and of a merged model: base, task, data, scores with intervals, how to load it, licence."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finetuning.pages import markdown_table
from finetuning.run_folder import (
    CARD,
    EVALUATION,
    adapter_base,
    evaluations,
    find_again,
    read_arguments,
    read_metrics,
    untuned_model,
    write_atomically,
)

# Licence of a base by its model type, where its own card is not at hand. Names as the Hub spells them.
LICENCES = {"llava": "llama2", "gemma": "gemma"}
RECIPE_KEYS = [
    *("language_model", "projector", "vision_tower", "lora_r", "lora_alpha", "lora_dropout", "load_in_4bit"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "fp16", "bf16", "image_aspect_ratio", "image_tiles", "seed"),
]
LOAD_VISION = """from PIL import Image
{imports}

processor = AutoProcessor.from_pretrained("{name}")
{load}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "How many people are in view?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.jpg"), text=prompt, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
LOAD_TEXT = """{imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
{load}
messages = [{{"role": "user", "content": "What is the anime about?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def licence_of(base: str) -> str | None:
    """The licence on the base's own card, else that of its model type; None if neither is known."""
    card = Path(base) / CARD
    if card.is_file():
        return ModelCard.load(card).data.license
    name = base.lower()
    return next((licence for kind, licence in LICENCES.items() if kind in name.rpartition("/")[2]), None)


def table(values: dict[str, Any]) -> str:
    """A Markdown table with a row for each key, or a sentence that there are none."""
    return markdown_table(["", ""], list(values.items())) if values else "None were recorded."


def about_data(run: Path, arguments: dict[str, Any]) -> str:
    """Name, rows and split rule of the data that the run was trained on."""
    if "dataset_name" not in arguments:
        return "Not recorded."
    data = Path(find_again(run, arguments["dataset_name"]))
    if not (data / "manifest.json").is_file():
        return f"`{data.name}`"
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    rows = ", ".join(f"{split} {count:,}" for split, count in manifest.get("rows", {}).items())
    rule = f". Split: {manifest['split_rule']}" if "split_rule" in manifest else ""
    return f"`{data.name}`; rows: {rows}{rule}"


def score_table(run: Path) -> str:
    """Each measure of each evaluation: base, this model, the change with its interval, and the best trivial answer."""
    rows = []
    for evaluated in evaluations(run):
        name = str(evaluated.parent.relative_to(run / EVALUATION))
        for verdict in json.loads(evaluated.read_text(encoding="utf-8")).get("verdict", []):
            trivial = verdict.get("trivial")
            change = f"{verdict['difference']:+.2f} ({verdict['low']:+.2f} to {verdict['high']:+.2f})"
            best = f"{trivial['base']:.2f}: {trivial['answer']}" if trivial else ""
            measure = f"{verdict['measure']}, {verdict['unit']}".rstrip(", ")
            rows.append(
                [name, measure, f"{verdict['base']:.2f}", f"{verdict['tuned']:.2f}", change, best, verdict["outcome"]]
            )
    if not rows:
        return "Not evaluated on held-out rows yet: `scripts/evaluate_llava.py`, `scripts/evaluate_gemma.py`."
    columns = ["split", "measure", "base", "this model", "change, 95 % interval", "best trivial answer", "outcome"]
    return markdown_table(columns, rows)


def how_to_load(name: str, base: str, *, vision: bool, adapter: bool) -> str:
    """Python that loads the model from `name` (a folder, or where it is uploaded) and asks it."""
    kind = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    imports = f"from transformers import {kind}, {'AutoProcessor' if vision else 'AutoTokenizer'}"
    load = f'model = {kind}.from_pretrained("{base if adapter else name}", dtype="auto", device_map="auto")'
    if adapter:
        imports = f"from peft import PeftModel\n{imports}"
        load += f'\nmodel = PeftModel.from_pretrained(model, "{name}")'
    return (LOAD_VISION if vision else LOAD_TEXT).format(imports=imports, name=name, load=load)


def card(name: str, run: Path, base: str, *, how: str, adapter: bool, proof: str = "") -> str:
    """The card's text. `how` says in one line what the model is; `proof` is a section of its own."""
    arguments, licence = read_arguments(run) or {}, licence_of(base)
    vision = any((folder / "processor_config.json").is_file() for folder in (run, Path(base)))
    header = ModelCardData(
        base_model=None if Path(base).exists() else base,
        license=licence,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text" if vision else "text-generation",
        tags=["trl", "sft", "lora"] if adapter or proof else ["trl", "sft"],
    )
    trained = {
        key: value for key, value in read_metrics(run).items() if key.startswith(("eval_", "train_loss", "global"))
    }
    parts = {
        "Scores": score_table(run),
        "How to ask it": f"```python\n{how_to_load(name, base, vision=vision, adapter=adapter)}\n```",
        "Data": about_data(run, arguments),
        "Recipe": table({key: arguments[key] for key in RECIPE_KEYS if key in arguments}),
        "While training": table(trained),
        **({"Proof of the merge": proof} if proof else {}),
        "Licence": f"The licence of the base goes with these weights: {licence or 'not known here, see the page of the base'}.",
    }
    sections = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"---\n{header.to_yaml()}\n---\n\n# {name}\n\n{how}\n\n{sections}\n"


def write_run_card(run: Path) -> None:
    """Write the run's README.md: when it is complete, and again with each evaluation."""
    adapter, base = adapter_base(run) is not None, untuned_model(run)
    arguments = read_arguments(run) or {}
    bits = ", its base in 4 bits" if arguments.get("load_in_4bit") else ""
    how = f"`{base}`, fine-tuned with LoRA{bits}: an adapter." if adapter else f"`{base}`, fine-tuned."
    write_atomically(run / CARD, card(run.name, run, base, how=how, adapter=adapter))


def write_model_card(folder: Path, run: Path, report: dict[str, Any]) -> None:
    """Write `folder/README.md` of a merged model from the run's files and the merge report."""
    merged, before = report["merged_against_tuned"], report["base_against_tuned"]
    proof = (
        f"Against base + adapter on {len(report['answers'])} fixed questions: {merged['mean_kl']:.2e} nats a token "
        f"(tolerance {report['tolerance']['mean_kl']:.0e}), {merged['equal_answers']} equal greedy answers. The base alone "
        f"is {before['mean_kl']:.2e} nats away. All numbers: `merge_report.json`."
    )
    how = f"`{report['base_model']}` (revision {report['base_revision']}), fine-tuned with LoRA and merged in {report['dtype']}."
    name = folder.name.removesuffix(".unfinished")
    text = card(name, run, report["base_model"], how=how, adapter=False, proof=proof)
    (folder / CARD).write_text(text, encoding="utf-8")
