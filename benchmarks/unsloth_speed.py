"""Train by Unsloth as `train_speed.py --unsloth PYTHON` orders it, which starts this file by that Python.

    PYTHON benchmarks/unsloth_speed.py FOLDER

FOLDER holds `order.json`, the model and its processor (`model`) and the tokenised rows (`rows`); what was measured goes to
`measured.json`. Each step prints a line `step`. Only Unsloth's environment is used here, not this project's.
"""

# Unsloth changes what is imported after it.
import unsloth  # isort: skip

import argparse
import json
from functools import partial
from pathlib import Path

import torch
import transformers
import trl
from clock import Clock, limit_memory
from datasets import load_from_disk
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer


def collate(rows: list[dict], image_processor, pad: int) -> dict[str, torch.Tensor]:
    """Rows with `input_ids`, `labels` and `images` -> a right-padded batch of shape (rows, tokens), and its pictures."""
    batch = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", pad), ("labels", -100))
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    pictures = [picture for row in rows for picture in row["images"]]
    return batch | dict(image_processor(pictures, return_tensors="pt"))  # with tiles their `image_sizes` too


def main() -> None:
    """Train with Unsloth on the rows in `folder`, and write what was measured beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    rows = load_from_disk(str(folder / "rows"))
    arguments = SFTConfig(**order["arguments"])
    checkpointing = "unsloth" if arguments.gradient_checkpointing else False
    torch.backends.cuda.matmul.allow_tf32 = True  # as train_speed.py has it for the others
    model, processor = unsloth.FastVisionModel.from_pretrained(
        str(folder / "model"),
        dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        load_in_4bit=order["nf4"],
        use_gradient_checkpointing=checkpointing,
    )
    if order["nf4"] and not getattr(model, "is_loaded_in_4bit", False):
        raise SystemExit("Unsloth cannot quantise here: see what it says of bitsandbytes above")
    model = unsloth.FastVisionModel.get_peft_model(
        model, **order["lora"], use_gradient_checkpointing=checkpointing, random_state=arguments.seed
    )
    limit_memory(order["memory_gib"], order["memory_elsewhere"])
    clock = Clock(order["warmup"], partial(print, "step", flush=True))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        data_collator=partial(collate, image_processor=processor.image_processor, pad=processor.tokenizer.pad_token_id),
        callbacks=[clock],
    )
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        (folder / "measured.json").write_text(json.dumps({"failed": str(error)}) + "\n", encoding="utf-8")
        return
    versions = {module.__name__: module.__version__ for module in (unsloth, torch, transformers, trl)}
    measured = json.dumps(clock.measured(trainer) | {"versions": versions})
    (folder / "measured.json").write_text(measured + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
