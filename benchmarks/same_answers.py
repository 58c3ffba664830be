"""Are this project's answers in 16 bits those of transformers' `generate`? Asks a trained model both ways, on one device.

    python benchmarks/same_answers.py --model outputs/llava-sample --dataset data/sample-cctv --output benchmarks/results/same
    python benchmarks/same_answers.py --model outputs/llava-sample --dataset data/sample-cctv --base_precision int8 \
        --output benchmarks/results/same-int8

`generate` answers one row at a time, so nothing is padded. Two right ways of rounding may choose another token where two
are nearly as likely: of each answer that differs the report names the first differing token, and by how much transformers'
own logit of its token is above that of ours. Beside it stands how often transformers agrees with itself when it answers
in padded batches. With --base_precision the same is asked of this project's decoder: what is left alone is the precision of
the base, and 16 bits in batches of another size stand beside it. Writes report.json and report.md. Measured on one NVIDIA H200.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from datasets import concatenate_datasets
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from finetuning.data.collator import prompt_batch
from finetuning.data.dataset import open_dataset
from finetuning.inference.generation import answer_batch, generate_answers
from finetuning.kernels.int8_base import set_base_precision
from finetuning.models.loading import load_for_inference
from finetuning.models.parts import base_model_of


@torch.no_grad()
def first_difference(model, processing_class, row: dict, theirs: str, ours: str) -> dict:
    """Where two answers to one row part, and the gap between the logits of both tokens, given what they have in common."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (theirs, ours))
    left, right = [*left, tokenizer.eos_token_id], [*right, tokenizer.eos_token_id]
    place = next(i for i, (one, two) in enumerate(zip(left, right, strict=False)) if one != two)
    inputs = prompt_batch(processing_class, [row]).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    common = torch.tensor([left[:place]], dtype=torch.long, device=model.device)
    for name, value in (("input_ids", common), ("attention_mask", torch.ones_like(common))):
        inputs[name] = torch.cat([inputs[name], value], dim=1)
    logits = model(**inputs).logits[0, -1].float()
    gap = float(logits[left[place]] - logits[right[place]])
    return {"theirs": theirs, "ours": ours, "token": place, "logit_gap": gap, "spread": float(logits.std())}


def asked_rows(name: str, number: int, *, vision: bool):
    """The first `number` rows of all splits, cut before their last answer."""
    dataset = open_dataset(name, vision=vision)
    rows = concatenate_datasets([dataset[split] for split in dataset])
    rows = rows.select(range(min(number, len(rows))))
    return rows.map(lambda row: {"messages": row["messages"][:-1]}, desc="Cutting answers")


def main() -> None:
    """Answer the questions both ways and print how many answers are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a run, a merged folder or a base")
    parser.add_argument("--dataset", required=True, help="a prepared dataset; its questions are asked")
    parser.add_argument("--output", type=Path, required=True, help="folder for the report")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=50, help="of transformers' padded batches")
    parser.add_argument(
        "--base_precision", choices=["int8"], help="compare this project in INT8 with itself in 16 bits"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model, processing_class = load_for_inference(options.model, dtype=dtype)
    rows = asked_rows(options.dataset, options.rows, vision=hasattr(base_model_of(model).config, "vision_config"))
    asked = [rows[index] for index in range(len(rows))]

    tokens, size = options.max_new_tokens, options.batch_size
    if options.base_precision:
        names = f"16 bits, batches of {size}", "16 bits, batches as memory allows", options.base_precision
        alone = generate_answers(model, processing_class, rows, max_new_tokens=tokens, batch_size=size)
        again = generate_answers(model, processing_class, rows, max_new_tokens=tokens)
        other, _ = load_for_inference(options.model, dtype=dtype)
        set_base_precision(other, options.base_precision, Path(options.model))
        ours = generate_answers(other, processing_class, rows, max_new_tokens=tokens, batch_size=size)
    else:
        # transformers first: this project fuses the adapters of the model that it is given
        names = "generate, one row at a time", f"generate, padded batches of {size}", "this project"
        alone = [
            answer_batch(model, processing_class, [row], max_new_tokens=tokens)[0] for row in tqdm(asked, unit="row")
        ]
        again = []
        for start in tqdm(range(0, len(asked), size), unit="batch"):
            again += answer_batch(model, processing_class, asked[start : start + size], max_new_tokens=tokens)
        ours = generate_answers(model, processing_class, rows, max_new_tokens=tokens)
    different = []
    for row, theirs, answer in zip(asked, alone, ours, strict=True):
        if theirs != answer:
            different.append(first_difference(model, processing_class, row, theirs, answer))

    # Report
    report = {
        "model": options.model,
        "ways": names,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": options.dtype,
        "rows": len(asked),
        "different_answers": len(set(alone)),
        "same": len(asked) - len(different),
        "same_of_itself": sum(one == two for one, two in zip(alone, again, strict=True)),
        "differences": different,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    lines = [
        f"{report['device']}, {options.dtype}, {options.model}: {names[2]} gives {report['same']} of {len(asked)} answers "
        f"({report['same'] / len(asked):.1%}) as {names[0]}; {names[1]}: {report['same_of_itself']}. "
        f"{report['different_answers']} different texts.",
        "",
        f"| {names[0]} | {names[2]} | token | logit gap | spread of the logits |",
        "|---|---|---|---|---|",
        *(
            f"| {one['theirs']} | {one['ours']} | {one['token']} | {one['logit_gap']:.4f} | {one['spread']:.2f} |"
            for one in sorted(different, key=lambda one: -one["logit_gap"])[:40]
        ),
    ]
    (options.output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
