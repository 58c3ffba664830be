"""An HTML page with rows as the model sees them: pictures as preprocessed, tokens with the supervised ones marked."""

import base64
import html
import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.label_audit import IGNORED, REASONS, RowAudit, collate

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #5b6570; --line: #d8dee4; --box: #f5f7f9;
  --mark: #d3f0da; --mark-line: #1a7f37; --special: #6639ba; --fault: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --soft: #9aa4ae; --line: #333a41;
  --box: #1d2226; --mark: #14401f; --mark-line: #4ac26b; --special: #c5a5ff; --fault: #ff8b7d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, "Noto Sans CJK KR", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); } .fault { color: var(--fault); overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 7rem; max-width: 40rem; }
.bars div { flex: 1; background: var(--mark-line); min-height: 1px; }
.ends { display: flex; justify-content: space-between; max-width: 40rem; border-top: 1px solid var(--line); }
article { border-top: 1px solid var(--line); padding: 1rem 0; display: flex; flex-wrap: wrap; gap: 1rem; }
article h3 { flex-basis: 100%; font-size: 1rem; margin: 0; } article h3 span { font-weight: 400; color: var(--soft); }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; flex: 0 0 auto; max-width: 100%; }
.pictures img { width: 16rem; max-width: 100%; height: auto; border-radius: 4px; display: block; }
.tokens { flex: 1 1 20rem; align-self: flex-start; min-width: 0; background: var(--box); border-radius: 4px; padding: .75rem; line-height: 2;
  font-family: ui-monospace, "Noto Sans Mono CJK KR", Menlo, Consolas, monospace; font-size: .875rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border: 1px solid var(--line); border-radius: 3px; padding: .05rem 0; }
.tokens .special { color: var(--special); }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding-right: .5rem; } }
.tokens .on { background: var(--mark); border-color: var(--mark-line); border-bottom-width: 3px; }
"""


def preview_page(
    title: str,
    audits: Sequence[RowAudit],
    shown: Sequence[tuple[RowAudit, dict[str, Any]]],
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
) -> str:
    """One self-contained page: the numbers of all `audits`, then the rows of `shown` with their decoded pictures."""
    faulty = [audit for audit in audits if audit.faults]
    verdict = f"{len(faulty):,} of {len(audits):,} rows have faults" if faulty else f"All {len(audits):,} rows are good"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{verdict}</h1><p class='soft'>{html.escape(title)}</p>",
        "<h2>Splits</h2>",
        _table([["split", "rows", "images", "shortest", "median", "longest", "supervised"], *length_table(audits)]),
        "<h2>Tokens a row</h2>",
        _histogram([audit.num_tokens for audit in audits if audit.num_tokens]),
    ]
    if faulty:
        counts = Counter(code for audit in faulty for code in {code for code, _ in audit.faults})
        parts += ["<h2>Faults</h2>"]
        parts += [f"<p><b>{code}</b>, {counts[code]:,} rows: {html.escape(REASONS[code])}</p>" for code in counts]
    parts += [
        f"<h2>{len(shown)} rows as the model sees them</h2>",
        "<p class='tokens'><span class='on'>marked</span> is supervised: the model learns to write it. "
        "<span>plain</span> is read only. <span class='special'>coloured</span> is a special token.</p>",
        *(_article(audit, row, processing_class) for audit, row in shown),
        "</body></html>",
    ]
    return "\n".join(parts)


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


def _article(audit: RowAudit, row: dict[str, Any], processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    faults = "".join(f"<p class='fault'><b>{code}</b>: {html.escape(detail)}</p>" for code, detail in audit.faults)
    numbers = (
        f"{audit.num_tokens:,} tokens, {audit.num_supervised:,} supervised" if audit.num_tokens else "not tokenised"
    )
    head = f"<h3>{html.escape(audit.split)} row {audit.row} <span>{numbers}</span></h3>"
    if not audit.num_tokens:
        said = "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
        return f"<article>{head}<div class='tokens'>{html.escape(said)}</div>{faults}</article>"
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    batch = collate(processing_class, [row])
    pictures = "".join(
        f"<img alt='picture {number} as preprocessed' src='data:image/jpeg;base64,{_jpeg(pixels, processing_class)}'>"
        for number, pixels in enumerate(batch.get("pixel_values", []), start=1)
    )
    spans = "".join(
        f"<span class='{'on ' if supervised else ''}{'special' if special else ''}'>{html.escape(text)}</span>"
        for text, supervised, special in token_pieces(
            tokenizer, batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        )
    )
    pictures = f"<div class='pictures'>{pictures}</div>" if pictures else ""
    return f"<article>{head}{pictures}<div class='tokens'>{spans}</div>{faults}</article>"


def _jpeg(pixels: torch.Tensor, processor: ProcessorMixin) -> str:
    buffer = io.BytesIO()
    picture_as_seen(pixels, processor).save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _table(rows: list[list[str]]) -> str:
    head, *body = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return "<div class='scroll'><table>" + "".join(f"<tr>{row}</tr>" for row in [head, *body]) + "</table></div>"


def _histogram(lengths: list[int], num_bars: int = 40) -> str:
    if not lengths:
        return "<p>No row could be tokenised.</p>"
    low, high = min(lengths), max(lengths)
    width = max((high - low + 1) / num_bars, 1)
    bars = Counter(int((length - low) / width) for length in lengths)
    tallest = max(bars.values())
    columns = "".join(
        f"<div style='height:{100 * bars[bar] / tallest:.1f}%' "
        f"title='{low + int(bar * width)} to {low + int((bar + 1) * width) - 1} tokens: {bars[bar]:,} rows'></div>"
        for bar in range(max(bars) + 1)
    )
    return f"<div class='bars'>{columns}</div><div class='ends soft'><span>{low:,}</span><span>{high:,}</span></div>"
