"""Merging of an adapter into its base, and a proof that the merged model answers as base + adapter do."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from finetuning.data.collator import prompt_batch
from finetuning.data.dataset import open_dataset, spread
from finetuning.families import is_vision
from finetuning.inference.generation import answer_batch

# Largest mean KL divergence (nats a token) between the next tokens of the merged model and of base + adapter. Both
# compute the same in another order. Rounding measured on SmolLM2-135M, LoRA on every layer: 1e-11 in float32, 3e-5 in
# float16, 2e-3 in bfloat16.
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
# Largest ratio to the divergence of the base alone; above it rounding has lost the training (peft#2586).
LARGEST_SHARE = 0.5
QUESTIONS = {
    True: ["How many circles are in the picture?", "이 그림을 한 문장으로 설명해 주세요."],
    False: ["Name three colours.", "한국의 수도는 어디인가요?"],
}


@dataclass
class Observation:
    """A model's output for a probe: its greedy answer, token ids of the answer that is followed, next-token logits.

    `logits` is (answer tokens + 1, vocabulary), fp32 on the CPU: at the prompt's end and after each of `answer_ids`.
    """

    answer: str
    answer_ids: list[int]
    logits: torch.Tensor


def dtype_of_run(arguments: dict[str, Any]) -> torch.dtype:
    """The precision that the run was trained in, from its `arguments.yaml`."""
    return torch.float16 if arguments.get("fp16") else torch.bfloat16 if arguments.get("bf16") else torch.float32


def num_weights(config: PreTrainedConfig) -> int:
    """Parameters of the model that the configuration describes, without loading or allocating them."""
    with init_empty_weights():
        model_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
        return model_class.from_config(config).num_parameters()


def draw_picture() -> Image.Image:
    """The built-in picture of the probes: 640 x 480, three discs and two squares on grey."""
    image = Image.new("RGB", (640, 480), (190, 190, 190))
    draw = ImageDraw.Draw(image)
    for x, y, colour in ((120, 130, "red"), (330, 250, "blue"), (520, 120, "green")):
        draw.ellipse((x - 60, y - 60, x + 60, y + 60), fill=colour)
    for x, y, colour in ((150, 370, "yellow"), (520, 370, "black")):
        draw.rectangle((x - 50, y - 50, x + 50, y + 50), fill=colour)
    return image


def make_probes(vision: bool, dataset_name: str | None, num_rows: int) -> list[dict[str, Any]]:
    """The built-in questions, and the first question of `num_rows` rows of the dataset, if its folder is here.

    The rows are of the validation or the test split, if there is one. Returns dicts with `messages` (ending with the
    question), `images` and `source`.
    """
    images = [draw_picture()] if vision else []
    probes = [
        {"messages": [{"role": "user", "content": question}], "images": images, "source": "built in"}
        for question in QUESTIONS[vision]
    ]
    if dataset_name is None or not Path(dataset_name).is_dir():
        return probes
    dataset = open_dataset(dataset_name, vision=vision)
    split = next((name for name in ("validation", "test", "train") if name in dataset), None)
    for row in spread(dataset[split], num_rows) if split else []:
        roles = [message["role"] for message in row["messages"]]
        if "assistant" in roles[1:]:
            messages = row["messages"][: roles.index("assistant", 1)]
            probes.append({"messages": messages, "images": row.get("images") or [], "source": f"{split} split"})
    return probes


@torch.no_grad()
def observe(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    probes: Sequence[dict[str, Any]],
    *,
    description: str,
    follow: Sequence[Observation] | None = None,
    max_new_tokens: int = 24,
) -> list[Observation]:
    """Greedy answer and logits of each probe. Logits are along the answers of `follow`, or of the model itself."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    observations = []
    for number, probe in enumerate(tqdm(probes, desc=description, unit="question")):
        answer = answer_batch(model, processing_class, [probe], max_new_tokens=max_new_tokens)[0]
        answer_ids = follow[number].answer_ids if follow else tokenizer.encode(" " + answer, add_special_tokens=False)
        inputs = prompt_batch(processing_class, [probe]).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        followed = torch.tensor([answer_ids], dtype=inputs["input_ids"].dtype, device=model.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], followed], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = model(**inputs, logits_to_keep=len(answer_ids) + 1).logits[0]
        observations.append(Observation(answer, answer_ids, logits.float().cpu()))
    return observations


def compare_observations(reference: Sequence[Observation], other: Sequence[Observation]) -> dict[str, float | int]:
    """Distance of `other` from `reference`, over all positions of all probes.

    Returns `mean_kl` (nats a token: KL(reference || other) of the next-token distributions), `largest_logit_difference`
    and `equal_answers` (of the greedy answers).
    """
    divergences, differences = [], []
    for one, two in zip(reference, other, strict=True):
        log_one, log_two = one.logits.double().log_softmax(-1), two.logits.double().log_softmax(-1)
        divergences.append((log_one.exp() * (log_one - log_two)).sum(-1))
        differences.append((one.logits - two.logits).abs().max().item())
    return {
        "mean_kl": max(torch.cat(divergences).mean().item(), 0.0),
        "largest_logit_difference": max(differences),
        "equal_answers": sum(one.answer == two.answer for one, two in zip(reference, other, strict=True)),
    }


def merge_in_place(model: PeftModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merge layer by layer, with memory for one more layer. Returns the model without PEFT, and counts of what changed.

    The counts: `adapted_layers`, `weights_in_them`, `weights_changed`, `whole_parts` (names of parts trained in full)
    and `weights_changed_in_whole_parts`. Raises ValueError if an adapter is not finite or if no weight changed.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    total = changed = 0
    for layer in tqdm(layers, desc="Merging", unit="layer"):
        before = layer.get_base_layer().weight.data
        layer.merge(safe_merge=True)  # into a new tensor, refused if it is not finite
        after = layer.get_base_layer().weight.data
        total += after.numel()
        changed += int((before != after).sum())
    parts_changed = 0
    for part in parts.values():
        trained, base = part.modules_to_save[part.active_adapter], part.original_module
        pairs = zip(trained.parameters(), base.parameters(), strict=True)
        parts_changed += sum(int((new.to(old.dtype) != old).sum()) for new, old in pairs)
    if not changed and not parts_changed:
        raise ValueError(
            "merging changed no weight at all: the adapter is zero, or smaller than the rounding of this dtype. Was "
            "anything trained? Compare with: python scripts/evaluate_llava.py"
        )
    dtype = model.dtype
    whole_parts = [name.rpartition(".")[2] for name in parts]
    return model.unload().to(dtype), {
        "adapted_layers": len(layers),
        "weights_in_them": total,
        "weights_changed": changed,
        "whole_parts": whole_parts,
        "weights_changed_in_whole_parts": parts_changed,
    }


def check_proof(report: dict[str, Any]) -> None:
    """Raise ValueError, naming each violation, if the merged model exceeds a tolerance of `report`."""
    merged, base = report["merged_against_tuned"], report["base_against_tuned"]
    tolerance, share = report["tolerance"]["mean_kl"], report["tolerance"]["share_of_training"]
    problems = []
    if merged["mean_kl"] > tolerance:
        problems.append(
            f"the merged model's next tokens differ from those of base + adapter by {merged['mean_kl']:.2e} nats, at "
            f"most {tolerance:.0e} is rounding in {report['dtype']}"
        )
    if merged["mean_kl"] > share * base["mean_kl"]:
        problems.append(
            f"it is {merged['mean_kl']:.2e} nats from base + adapter, and the base alone {base['mean_kl']:.2e}: "
            "what was trained is lost in rounding; merge with --dtype float16 or float32, or train longer"
        )
    if report["dtype"] == "float32" and merged["equal_answers"] < len(report["answers"]):
        problems.append(f"only {merged['equal_answers']} of {len(report['answers'])} greedy answers are equal")
    if problems:
        raise ValueError("the merge is not proven: " + "; ".join(problems))


def without_training_marks(template: str) -> str:
    """The same chat template for programs that do not know transformers' `generation` block, such as llama.cpp."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def write_merge_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `merge_report.json` into `folder`."""
    (folder / "merge_report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
