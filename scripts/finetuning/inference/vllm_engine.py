"""Answers by vLLM, for `--engine vllm`: prompts are this project's, token for token, and so are the pixels and the stops.

vLLM is not among the requirements: it pins its own PyTorch and transformers, so it is installed in an environment of its own.
It answers with merged models, models trained in full, and adapters of the language model. Its LoRA leaves the vision
tower and the projector out, so an adapter that trains them is refused: merged, it is answered.
"""

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from PIL import Image, ImageOps
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.collator import image_token_of, prompt_batch, stop_tokens
from finetuning.data.image_tiles import tiles_of, views_of, with_tiles
from finetuning.data.pictures import open_picture
from finetuning.device import inference_dtype
from finetuning.models.parts import part_of
from finetuning.models.processing import load_config
from finetuning.run_folder import ADAPTER_WEIGHTS, adapter_base, read_arguments
from finetuning.strategy import Strategy

MODEL_TYPES = ("llava", "llama", "gemma", "gemma2", "gemma3_text")  # whose pictures, if any, are one tile each
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may be
ROWS_AT_ONCE = 1024  # whose pictures are in memory; vLLM batches them itself


def refuse_vllm(name: str) -> None:
    """Raises ValueError where vLLM cannot answer for `name`."""
    if reason := reason_against_vllm(name):
        raise ValueError(f"--engine vllm: {reason}")


def reason_against_vllm(name: str) -> str | None:
    """Why vLLM cannot answer for the run, merged folder or base `name`, and what to do; None where it can."""
    merged = f"merge it first: python scripts/merge_adapter.py --run {name} --output models/merged"
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here: it needs an environment of its own (docs/serving.md)"
    if Strategy.from_environment().num_processes > 1:
        return "vLLM starts its own processes: run the command with python, not with accelerate launch"
    base = adapter_base(Path(name))
    kind = load_config(base or name).model_type
    if kind not in MODEL_TYPES:
        return f"{name} is a {kind}, and only {', '.join(MODEL_TYPES)} are handed to vLLM: leave --engine out"
    if base is None:
        return None
    if (read_arguments(Path(name)) or {}).get("load_in_4bit"):
        return f"{name} was trained over 4-bit weights, which vLLM would quantise in its own way: {merged}"
    config = PeftConfig.from_pretrained(name)
    with safe_open(Path(name) / ADAPTER_WEIGHTS, framework="pt") as file:
        parts = {part_of(key) for key in file.keys()} - {"language_model"}  # noqa: SIM118 - not a dict
    if parts or config.modules_to_save:
        return f"the adapter {name} trains {', '.join(sorted(parts))}, which vLLM's LoRA leaves out: {merged}"
    if config.use_dora or config.r > RANKS[-1]:
        return f"vLLM knows no DoRA, and no rank above {RANKS[-1]}: {merged}"
    return None


def answer_by_vllm(
    name: str,
    base: str,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    names: Sequence[str] = ("tuned",),
    dtype: torch.dtype | None = None,
) -> Iterator[dict[str, list[str]]]:
    """Greedy answers in the order of the rows, some at a time: for each of `names` a list, as `answer_rows` gives them.

    `name` is the run or model that answers as "tuned". "base" is the adapter's base without it; of other runs the base is
    another model, asked by a call of its own. Raises ValueError where vLLM would read another prompt than training did.
    """
    from vllm import LLM, SamplingParams  # pyrefly: ignore[missing-import] - in an environment of its own
    from vllm.lora.request import LoRARequest  # pyrefly: ignore[missing-import]

    is_adapter = adapter_base(Path(name)) is not None
    adapter = {}
    if is_adapter:
        rank = PeftConfig.from_pretrained(name).r
        adapter = {"enable_lora": True, "max_lora_rank": next(size for size in RANKS if size >= rank)}
    most_images = max((len(row.get("images") or ()) for row in rows), default=0) if has_images(rows) else 0
    engine = LLM(
        model=base if is_adapter else name,
        dtype=str(dtype or inference_dtype()).removeprefix("torch."),
        limit_mm_per_prompt={"image": most_images * views_of(processing_class)} if most_images else None,
        seed=0,
        **adapter,
    )
    # Stops are this project's: those that a config or a tokenizer names may be others.
    sampling = SamplingParams(
        temperature=0, max_tokens=max_new_tokens, stop_token_ids=stop_tokens(processing_class), ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    try:
        for start in tqdm(range(0, len(rows), ROWS_AT_ONCE), desc="Asking vLLM", unit="batch", leave=False):
            some = [rows[number] for number in range(start, min(start + ROWS_AT_ONCE, len(rows)))]
            expected = [prompt_batch(processing_class, [row])["input_ids"][0].tolist() for row in some]
            prompts = [vllm_prompt(processing_class, row, tokens) for row, tokens in zip(some, expected, strict=True)]
            window = {}
            for each in names:
                lora = LoRARequest("tuned", 1, name) if is_adapter and each == "tuned" else None
                outputs = engine.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
                for number, (output, tokens) in enumerate(zip(outputs, expected, strict=True), start):
                    if list(output.prompt_token_ids) != tokens:
                        raise ValueError(
                            f"row {number}: vLLM read {len(output.prompt_token_ids)} tokens where this project's prompt has "
                            f"{len(tokens)}, or others: this version of vLLM cannot be used; leave --engine out"
                        )
                texts = tokenizer.batch_decode(
                    [list(output.outputs[0].token_ids) for output in outputs], skip_special_tokens=True
                )
                window[each] = [text.strip() for text in texts]
            yield window
    finally:
        del engine
        gc.collect()


def has_images(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the first row has pictures."""
    return bool(len(rows)) and bool(rows[0].get("images"))


def vllm_prompt(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase, row: dict[str, Any], tokens: list[int]
) -> dict[str, Any]:
    """A row as vLLM's TokensPrompt: each picture one image token, which vLLM repeats, and the picture as it is seen."""
    images = row.get("images") or []
    if not images:
        return {"prompt_token_ids": tokens}
    image_token = image_token_of(processing_class)
    views = with_tiles([open_picture(image) for image in images], tiles_of(processing_class))
    a_view = tokens.count(image_token) // len(views)
    kept, seen = [], 0
    for token in tokens:
        is_image = token == image_token
        if not is_image or seen % a_view == 0:
            kept.append(token)
        seen += is_image
    return {
        "prompt_token_ids": kept,
        "multi_modal_data": {"image": [as_seen(processing_class, view) for view in views]},
    }


def as_seen(processor: ProcessorMixin, picture: Image.Image) -> Image.Image:
    """The picture made square where training padded it (`do_pad`): vLLM's processor is that of the base, which crops."""
    settings = processor.image_processor
    if not getattr(settings, "do_pad", False):
        return picture
    side = max(picture.size)
    colour = tuple(int(share * 255) for share in settings.image_mean)
    left, top = ((side - length) // 2 for length in picture.size)
    right, bottom = (side - length - before for length, before in zip(picture.size, (left, top), strict=True))
    return ImageOps.expand(picture.convert("RGB"), (left, top, right, bottom), fill=colour)
