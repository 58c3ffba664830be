"""Tiny models whose answers differ from row to row, and rows of every kind to ask them."""

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from finetuning.inference.generation import answer_batch
from finetuning.models.processing import load_processing_class

QUESTIONS = ["How many people are in view?", "사람이 몇 명 있나요? 모두 세어 주세요.", "Count.", "How many?" * 5]
LINEAR = r".*(language_model|model)\.layers\..*(q|k|v|o|gate|up|down)_proj"


def load(folder, *, adapter: bool, targets: str = LINEAR, seed: int = 0, **settings):
    """A tiny model whose answers differ from row to row, with an adapter that changes them."""
    vision = "llava" in folder.name
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".layers." in name and "norm" not in name and "vision" not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # else a tied head answers with the last token again
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            parameter.requires_grad_(False)
    return model.eval(), load_processing_class(str(folder))


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (48, 64, 3), dtype=torch.uint8, generator=generator).numpy())


def vision_rows() -> list[dict]:
    """One question, several about one image, several turns, two images, none."""
    user, assistant = (
        (lambda text: {"role": "user", "content": text}),
        (lambda text: {"role": "assistant", "content": text}),
    )
    rows = [{"messages": [user(QUESTIONS[0])], "images": [picture(0)], "image_id": "a"}]
    rows += [{"messages": [user(text)], "images": [picture(1)], "image_id": "b"} for text in QUESTIONS[:3]]
    rows += [
        {"messages": [user(QUESTIONS[2]), assistant("There are 3."), user(QUESTIONS[1])], "images": [picture(2)]},
        {"messages": [user(QUESTIONS[3])], "images": [picture(3), picture(4)]},
        {"messages": [user(QUESTIONS[1])], "images": []},
        {
            "messages": [{"role": "system", "content": "Be short."}, user(QUESTIONS[0])],
            "images": [picture(1)],
            "image_id": "b",
        },
    ]
    return rows


def text_rows() -> list[dict]:
    user, assistant = (
        (lambda text: {"role": "user", "content": text}),
        (lambda text: {"role": "assistant", "content": text}),
    )
    rows = [{"messages": [user(text)]} for text in QUESTIONS]
    return [*rows, {"messages": [user(QUESTIONS[0]), assistant("None."), user(QUESTIONS[2])]}]


def both_one_by_one(model, processor, rows) -> tuple[list[str], list[str]]:
    """(answers with the adapter, answers without)"""
    tuned = one_by_one(model, processor, rows)
    with model.disable_adapter():
        return tuned, one_by_one(model, processor, rows)


def one_by_one(model, processing_class, rows, max_new_tokens=12):
    return [answer_batch(model, processing_class, [row], max_new_tokens=max_new_tokens)[0] for row in rows]
