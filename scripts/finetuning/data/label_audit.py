"""The label audit: what the processor, the template and the collator make of each row, checked before a GPU is paid for."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from finetuning.data.collator import (
    LlavaDataCollator,
    image_token_of,
    place_images,
    prompt_batch,
    stop_tokens,
    tokenize,
    tokens_of_images,
    until_the_question,
)
from finetuning.data.image_tiles import tiles_of, views_of, with_tiles
from finetuning.data.near_duplicates import COPY_BITS, are_copies, difference_hash, near_duplicates, stack_hashes
from finetuning.data.picture_table import StoredImage
from finetuning.data.pictures import PictureError, open_pictures, what_is_blank
from finetuning.families import family_of

IGNORED = -100
# Reason code of a fault -> what it does to training, and what to do about it.
REASONS = {
    "unreadable_image": "a picture does not decode: training would stop here; replace the file and prepare again",
    "refused_by_template": "the chat template or the processor refuses the conversation: correct its roles and images",
    "image_tokens_differ": "image tokens and picture features differ: remove <image> from the text (the collator puts "
    "it there), or use the processor that belongs to the model",
    "too_long": "the row is longer than max_length or than the model: shorten it, else it is cut or out of positions",
    "bos_count": "not exactly one beginning-of-sequence token: the text or the template writes another, or none",
    "nothing_supervised": "an answer is not supervised: the conversation has none, or the template does not mark it",
    "empty_answer": "the supervised answer has no text: the model would learn to say nothing",
    "end_not_supervised": "the answer's end is not supervised: the model would never learn to stop; use this project's "
    "template",
    "ends_early": "a token that ends an answer stands inside it: the model would learn to stop there",
    "image_supervised": "an image token is supervised: the template marks more than the answer",
    "padding_supervised": "padding is supervised: the answer holds the pad token, or padding is not masked",
    "prompt_differs": "the prompt that the model is asked with is not the beginning of what it was trained on, or ends "
    "elsewhere than supervision begins",
    "blank_image": "there is nothing to see in a picture: the model would learn to answer blindly; look at its file",
    "labels_differ": "pictures that look the same are labelled differently: one of the labels is wrong",
}
# Faults of the data alone: a training that begins with such rows is not stopped for them.
# Different pictures of which each is compared with each (5 * 10^9 pairs take half a minute), and pairs that are opened.
MOST_COMPARED, MOST_SUSPECTS = 50_000, 2_000
OF_THE_DATA = ("blank_image", "labels_differ")


@dataclass
class RowAudit:
    """One row as the model sees it: lengths in tokens, and its faults as (reason code, detail)."""

    split: str
    row: int
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    hashes: list[bytes] = field(default_factory=list, repr=False)  # of its pictures, as `difference_hash` makes them
    faults: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Auditor:
    """Audits rows with `messages` (and `images`, for a vision model); also the `collate_fn` of a DataLoader.

    `config` is the model's: how many features a picture gives is asked of the model, not of the processor that is
    checked. `max_length` is the recipe's. Pictures are whatever `open_picture` opens.

    Of the pictures of one size only the first goes through the processor: what the others show changes no token.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    config: PreTrainedConfig
    max_length: int | None = None
    split: str = "train"
    # Kinds of pictures (`_kinds`) -> tokens of one.
    tokens_of_kind: dict[tuple[int, int, bool], int] = field(default_factory=dict)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[RowAudit]:
        """One RowAudit per row, in order."""
        audits = [RowAudit(self.split, row.get("row", number)) for number, row in enumerate(rows)]
        readable = []
        for audit, row in zip(audits, rows, strict=True):
            try:
                row = row | {"images": open_pictures(row.get("images") or [])}
                row["views"] = with_tiles(row["images"], tiles_of(self.processing_class))
            except PictureError as error:
                audit.faults.append(("unreadable_image", f"{error} ({error.reason})"))
                continue
            audit.num_images = len(row["views"])
            audit.hashes = [difference_hash(image) for image in row["images"]]
            audit.faults += self._refusals(row)
            if not audit.faults:
                readable.append((audit, row))
        whole, light = self._divide(readable)
        if whole:
            batch = collate(self.processing_class, [row for _, row in whole])
            for position, (audit, row) in enumerate(whole):
                ids, mask, labels = (batch[key][position] for key in ("input_ids", "attention_mask", "labels"))
                self._learn_size(row, ids, batch)
                self._check(audit, row, ids, mask, labels)
        for audit, row in light:
            ids, labels = tokenize(
                self.processing_class,
                self._typed(row["messages"], row["views"]),
                self._tokens_of(row["views"]),
            )
            self._check(audit, row, ids, torch.ones_like(ids), labels)
        for audit, row in readable:
            blank = filter(None, map(what_is_blank, row["images"]))
            audit.faults += [("blank_image", detail) for detail in blank]
        return audits

    def _divide(self, readable: list[tuple[RowAudit, dict[str, Any]]]) -> tuple[list, list]:
        """(rows that go through the collator together, as in training; rows of which only the text is tokenised)."""
        if not isinstance(self.processing_class, ProcessorMixin):
            return readable, []
        new: dict[tuple, int] = {}
        light = []
        for place, (_, row) in enumerate(readable):
            kinds = set(self._kinds(row["views"]))
            # A picture and its tiles are of several sizes, each of which is learnt from one row.
            mixed = len(kinds) > 1 and tiles_of(self.processing_class) is None
            if mixed or not kinds <= self.tokens_of_kind.keys():
                new.setdefault(tuple(sorted(kinds)), place)
            if not mixed:
                light.append(place)
        whole = set(new.values()) | (set(range(len(readable))) - set(light))
        # A neighbour, so that one of the two is padded.
        whole |= {place for place in light[:2] if new}
        return (
            [item for place, item in enumerate(readable) if place in whole],
            [item for place, item in enumerate(readable) if place not in whole],
        )

    def _learn_size(self, row: dict[str, Any], ids: torch.Tensor, batch: dict[str, Any]) -> None:
        if "pixel_values" not in batch:
            return
        self.picture_size = tuple(batch["pixel_values"].shape[-2:])
        kinds = self._kinds(row["views"])
        if len(set(kinds)) == 1 or tiles_of(self.processing_class) is not None:
            tokens = tokens_of_images(ids, image_token_of(self.processing_class), len(kinds))
            self.tokens_of_kind |= zip(kinds, tokens, strict=True)

    def _kinds(self, images: Sequence[Image.Image]) -> list[tuple[int, int, bool]]:
        """What the number of a picture's tokens depends on: width, height, and whether it is one of several seen otherwise."""
        several = len(images) > 1 and family_of(self.config).several_as_views
        return [(*image.size, several) for image in images]

    def _tokens_of(self, images: Sequence[Image.Image]) -> list[int]:
        """Tokens of each picture, of kinds that are known."""
        return [self.tokens_of_kind[kind] for kind in self._kinds(images)]

    def _refusals(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Faults for which the processor would raise an error, found on the text: cheap, and by name."""
        vision = isinstance(self.processing_class, ProcessorMixin)
        if row["images"] and not vision:
            return [("refused_by_template", f"{len(row['images'])} images for a model that reads text only")]
        try:
            messages = row["messages"]
            if vision:
                messages = self._typed(messages, row["views"])
            text = self.processing_class.apply_chat_template(messages, tokenize=False)
        except (ValueError, TemplateError) as error:
            return [("refused_by_template", str(error))]
        marks = text.count(self.processing_class.image_token) if vision else 0
        if marks != len(row["views"]):
            return [("image_tokens_differ", f"{marks} image marks in the text, {len(row['views'])} images")]
        return []

    def _check(
        self, audit: RowAudit, row: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> None:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        stops = stop_tokens(self.processing_class)
        image_id = getattr(self.config, "image_token_id", None)
        audit.num_tokens = int(mask.sum())
        audit.num_supervised = int((labels != IGNORED).sum())
        report = audit.faults.append

        if (labels[mask == 0] != IGNORED).any() or (
            tokenizer.pad_token_id not in stops and (labels == tokenizer.pad_token_id).any()
        ):
            report(("padding_supervised", f"pad token {tokenizer.pad_token!r}"))
        ids, labels = ids[mask == 1].tolist(), labels[mask == 1].tolist()

        if image_id is not None:
            sizes = [(image.height, image.width) for image in row["views"]]
            expected = (
                sum(family_of(self.config).features_of_row(self.config, sizes, self.picture_size)) if sizes else 0
            )
            if ids.count(image_id) != expected:
                detail = f"{ids.count(image_id)} image tokens, {expected} features of {audit.num_images} images"
                report(("image_tokens_differ", detail))
        limit = min(self.max_length or len(ids), self.config.get_text_config().max_position_embeddings)
        if len(ids) > limit:
            report(("too_long", f"{len(ids)} tokens, at most {limit}"))
        if tokenizer.bos_token_id is not None and ids.count(tokenizer.bos_token_id) != 1:
            report(("bos_count", f"{ids.count(tokenizer.bos_token_id)} of {tokenizer.bos_token!r}"))
        if image_id is not None and image_id in labels:
            report(("image_supervised", f"{labels.count(image_id)} image tokens"))
            return  # the answer's beginning is wrong then, too: one fault, not two

        answers = [
            place
            for place, message in enumerate(row["messages"])
            if message["role"] == "assistant" and message.get("weight") != 0
        ]
        spans = supervised_spans(labels)
        if not answers or len(spans) < len(answers):
            report(("nothing_supervised", f"{len(spans)} supervised answers of {len(answers)}"))
            return
        for number, (start, end) in enumerate(spans, start=1):
            where = f"answer {number} of {len(answers)}"
            words = [token for token in ids[start:end] if token not in stops]
            if ids[end - 1] not in stops:
                report(("end_not_supervised", f"{where} ends with {tokenizer.decode(ids[end - 1])!r}"))
            if any(token in stops for token in ids[start : end - 1]):
                report(("ends_early", f"{where}: {tokenizer.decode(ids[start:end])!r:.120}"))
            if not tokenizer.decode(words, skip_special_tokens=True).strip() and not audit.faults:
                report(("empty_answer", where))
        if answers[0] == 0:
            report(("prompt_differs", "the conversation begins with an answer: there is nothing to ask"))
            return
        for number, (place, prompt) in enumerate(zip(answers, self._prompts(row, answers), strict=True)):
            start = spans[number][0] if number < len(spans) else len(ids)
            same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            if same < len(prompt):
                trained, asked = tokenizer.decode(ids[same : same + 4]), tokenizer.decode(prompt[same : same + 4])
                detail = f"answer {number + 1}, token {same}: trained on {trained!r}, asked with {asked!r}"
                report(("prompt_differs", detail))
            elif start != len(prompt):
                detail = f"message {place + 1}: the prompt has {len(prompt)} tokens, supervision begins at {start}"
                report(("prompt_differs", detail))

    def _prompts(self, row: dict[str, Any], answers: list[int]) -> list[list[int]]:
        """Token ids that the model would be asked with before each of the answers."""
        prompts = [{"messages": row["messages"][:place], "images": row["images"]} for place in answers]
        cuts = list(map(until_the_question, prompts))
        views = [with_tiles(cut["images"], tiles_of(self.processing_class)) for cut in cuts]
        vision = isinstance(self.processing_class, ProcessorMixin)
        if not vision or any(not set(self._kinds(shown)) <= self.tokens_of_kind.keys() for shown in views):
            batch = prompt_batch(self.processing_class, prompts)
            return [
                ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        return [
            tokenize(
                self.processing_class,
                self._typed(cut["messages"], shown),
                self._tokens_of(shown),
                prompt=True,
            )[0].tolist()
            for cut, shown in zip(cuts, views, strict=True)
        ]

    def _typed(self, messages: list[dict[str, Any]], views: list[Image.Image]) -> list[dict[str, Any]]:
        """Messages with a part for each view of their pictures, as the collator has them."""
        return prepare_multimodal_messages(place_images(messages, views_of(self.processing_class)), images=views)


def labels_of(rows: Dataset) -> list[dict[str, str]]:
    """For each row what it says of its picture, by what is asked: its `count`, or answers of up to three words.

    Longer answers to one question may differ and all be right, as captions do.
    """
    if "count" in rows.column_names:
        return [{} if count is None else {"count": str(count)} for count in rows["count"]]
    labels = []
    for messages in rows["messages"]:
        label = {}
        for question, answer in itertools.pairwise(messages):
            words = re.findall(r"\w+", answer["content"].casefold())
            if answer["role"] == "assistant" and len(words) <= 3:
                label[question["content"]] = " ".join(words)
        labels.append(label)
    return labels


def report_differing_labels(
    audits: Sequence[RowAudit], labels: Sequence[dict[str, str]], open_first: Callable[[RowAudit], Image.Image]
) -> None:
    """Adds the fault `labels_differ` to rows that say different things of pictures that show the same.

    `labels` are those of the rows of `audits`, `open_first` opens the picture of such a row. Rows with several pictures are
    left out. Past 50,000 different pictures only those with equal hashes are compared.
    """
    number_of: dict[bytes, int] = {}
    said: list[dict[str, tuple[RowAudit, str]]] = []
    suspects: list[tuple[RowAudit, str, RowAudit, str]] = []

    def compare(mine: dict[str, tuple[RowAudit, str]], others: dict[str, tuple[RowAudit, str]]) -> None:
        for key in mine.keys() & others.keys():
            (first, value), (second, other) = mine[key], others[key]
            if value != other:
                suspects.append((first, value, second, other))

    for audit, label in zip(audits, labels, strict=True):
        if len(audit.hashes) == 1 and label:
            number = number_of.setdefault(audit.hashes[0], len(number_of))
            says = {key: (audit, value) for key, value in label.items()}
            if number == len(said):
                said.append({})
            compare(said[number], says)
            said[number] = says | said[number]
    if said and len(said) <= MOST_COMPARED:
        hashes = stack_hashes(list(number_of))
        for pairs in near_duplicates(hashes, hashes, COPY_BITS):
            for left, right, _ in pairs.tolist():
                compare(said[left], said[right])
    for first, value, second, other in suspects[:MOST_SUSPECTS]:
        if are_copies(open_first(first), open_first(second)):
            for audit, own, twin, its in ((first, value, second, other), (second, other, first, value)):
                detail = f"it says {own!r}, {twin.split} row {twin.row} says {its!r} of a picture that looks the same"
                if "labels_differ" not in (code for code, _ in audit.faults):
                    audit.faults.append(("labels_differ", detail))


def undecoded(rows: Dataset, indices: list[int]) -> list[dict[str, Any]]:
    """Rows straight out of Arrow, their pictures not decoded: the auditor can then name the one that does not open."""
    found = rows.with_format("arrow")[indices].to_pylist()
    if isinstance(feature := getattr(rows.features.get("images"), "feature", None), StoredImage):
        for row in found:
            row["images"] = [feature.decode_example(image) for image in row["images"] or []]
    return found


def collate(processing_class: ProcessorMixin | PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows -> the batch that training sees: `input_ids`, `attention_mask`, `labels` and, with pictures, `pixel_values`."""
    if isinstance(processing_class, ProcessorMixin):
        return LlavaDataCollator(processing_class)(
            [{"messages": row["messages"], "images": row["images"]} for row in rows]
        )
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # the Trainer comes with it

    examples = []
    for row in rows:
        encoded = processing_class.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [token if supervised else IGNORED for token, supervised in pairs]
        examples.append({"input_ids": encoded["input_ids"], "labels": labels})
    return DataCollatorForLanguageModeling(pad_token_id=processing_class.pad_token_id)(examples)


def supervised_spans(labels: list[int]) -> list[tuple[int, int]]:
    """[start, end) of each unbroken run of supervised tokens."""
    marks = [False, *(label != IGNORED for label in labels), False]
    edges = [place for place in range(len(labels) + 1) if marks[place] != marks[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def describe_faults(audits: Sequence[RowAudit], shown: int = 5) -> str:
    """Each reason code once: how often, what it means, and its first rows."""
    counts = Counter(code for audit in audits for code in {code for code, _ in audit.faults})
    lines = []
    for code in (code for code in REASONS if code in counts):
        rows = [(audit, detail) for audit in audits for found, detail in audit.faults if found == code]
        lines.append(f"{code} ({counts[code]:,} rows): {REASONS[code]}")
        lines += [f"  {audit.split} row {audit.row}: {' '.join(detail.split())}" for audit, detail in rows[:shown]]
        lines += [f"  ... and {len(rows) - shown:,} more"] if len(rows) > shown else []
    return "\n".join(lines)


def check_first_rows(
    rows: Dataset,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    max_length: int | None = None,
    number: int = 8,
) -> None:
    """The audit of the first `number` rows, for the start of a training. Raises ValueError that lists their faults."""
    first = undecoded(rows, list(range(min(number, len(rows)))))
    audits = Auditor(processing_class, config, max_length)(first)
    for audit in audits:
        audit.faults = [fault for fault in audit.faults if fault[0] not in OF_THE_DATA]
    if any(audit.faults for audit in audits):
        raise ValueError(
            f"the first {len(first)} training rows cannot be trained on:\n{describe_faults(audits)}\n"
            "Look at all rows with: python scripts/check_data.py (same --config and flags)"
        )
