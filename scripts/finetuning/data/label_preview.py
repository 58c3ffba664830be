"""An HTML page with rows as the model sees them: pictures as preprocessed, tokens with the supervised ones marked."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.label_audit import IGNORED, REASONS, RowAudit, collate
from finetuning.pages import Table, render_page

NUM_BARS = 40
LENGTH_COLUMNS = ["split", "rows", "images", "shortest", "median", "longest", "supervised"]


def preview_page(
    title: str,
    audits: Sequence[RowAudit],
    shown: Sequence[tuple[RowAudit, dict[str, Any]]],
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
) -> str:
    """One self-contained page: the numbers of all `audits`, then the rows of `shown` with their decoded pictures."""
    faulty = [audit for audit in audits if audit.faults]
    counts = Counter(code for audit in faulty for code in {code for code, _ in audit.faults})
    lengths = [audit.num_tokens for audit in audits if audit.num_tokens]
    return render_page(
        "label_preview.html.jinja",
        title=title,
        verdict=f"{len(faulty):,} of {len(audits):,} rows have faults"
        if faulty
        else f"All {len(audits):,} rows are good",
        lengths=Table("Splits", LENGTH_COLUMNS, length_table(audits)),
        bars=_histogram(lengths) if lengths else [],
        shortest=f"{min(lengths, default=0):,}",
        longest=f"{max(lengths, default=0):,}",
        faults=[{"code": code, "rows": f"{counts[code]:,}", "reason": REASONS[code]} for code in counts],
        rows=[_shown_row(audit, row, processing_class) for audit, row in shown],
    )


def length_table(audits: Sequence[RowAudit]) -> list[list[str]]:
    """One line per split: rows, images, shortest, median and longest row in tokens, share of supervised tokens."""
    lines = []
    for split in dict.fromkeys(audit.split for audit in audits):
        of_split = [audit for audit in audits if audit.split == split]
        lengths = sorted(audit.num_tokens for audit in of_split if audit.num_tokens) or [0]
        share = sum(audit.num_supervised for audit in of_split) / max(sum(lengths), 1)
        images = sum(audit.num_images for audit in of_split)
        middle = lengths[len(lengths) // 2]
        numbers = [f"{number:,}" for number in (len(of_split), images, lengths[0], middle, lengths[-1])]
        lines.append([split, *numbers, f"{share:.2%}"])
    return lines


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> list[tuple[str, bool, bool]]:
    """(text, supervised, special) of each token; equal neighbours such as image tokens become one with their number.

    Letters outside the vocabulary are several byte tokens (`<0xEC>`), shown together as the letter they spell.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[tuple[str, bool, bool]] = []
    place = 0
    while place < len(ids):
        token, supervised = tokenizer.convert_ids_to_tokens(ids[place]), labels[place] != IGNORED
        end = place + 1
        if ids[place] in special:
            while end < len(ids) and ids[end] == ids[place] and (labels[end] != IGNORED) == supervised:
                end += 1
            pieces.append((token + (f" × {end - place}" if end - place > 1 else ""), supervised, True))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            while end < len(ids) and re.fullmatch(r"<0x[0-9A-F]{2}>", tokenizer.convert_ids_to_tokens(ids[end])):
                end += 1
            codes = [tokenizer.convert_ids_to_tokens(number)[3:5] for number in ids[place:end]]
            letters = bytes.fromhex("".join(codes)).decode("utf-8", errors="replace")
            pieces.append((letters.replace("\n", "↵\n"), supervised, False))
        else:
            pieces.append((token.replace("▁", " ").replace("\n", "↵\n"), supervised, False))
        place = end
    return pieces


def picture_as_seen(pixels: torch.Tensor, processor: ProcessorMixin) -> Image.Image:
    """`pixel_values` of one picture, (3, height, width), normalised -> the picture that the vision tower sees."""
    mean, std = (torch.tensor(values)[:, None, None] for values in _normalisation(processor))
    colours = ((pixels.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(colours.permute(1, 2, 0).numpy())


def _normalisation(processor: ProcessorMixin) -> tuple[list[float], list[float]]:
    return processor.image_processor.image_mean, processor.image_processor.image_std


def _shown_row(
    audit: RowAudit, row: dict[str, Any], processing_class: ProcessorMixin | PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What the page shows of one row: name, faults and, where it can be tokenised, pictures and tokens."""
    numbers = (
        f"{audit.num_tokens:,} tokens, {audit.num_supervised:,} supervised" if audit.num_tokens else "not tokenised"
    )
    shown: dict[str, Any] = {
        "name": f"{audit.split} row {audit.row}",
        "numbers": numbers,
        "faults": audit.faults,
        "pictures": [],
        "pieces": [],
        "text": "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"]),
    }
    if audit.num_tokens:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        batch = collate(processing_class, [row])
        shown["pictures"] = [picture_as_seen(pixels, processing_class) for pixels in batch.get("pixel_values", [])]
        shown["pieces"] = token_pieces(tokenizer, batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
    return shown


def _histogram(lengths: list[int]) -> list[dict[str, str]]:
    """Bars of equal width over the lengths in tokens: height in percent of the tallest, and a label."""
    low, high = min(lengths), max(lengths)
    width = max((high - low + 1) / NUM_BARS, 1)
    bars = Counter(int((length - low) / width) for length in lengths)
    tallest = max(bars.values())
    return [
        {
            "height": f"{100 * bars[bar] / tallest:.1f}",
            "label": f"{low + int(bar * width)} to {low + int((bar + 1) * width) - 1} tokens: {bars[bar]:,} rows",
        }
        for bar in range(max(bars) + 1)
    ]
