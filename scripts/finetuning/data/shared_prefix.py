"""Dialogues about the same image train as one sequence, so that the image is computed once.

    [image prefix | dialogue 1 | dialogue 2 | ...]

Each dialogue attends to the prefix and to itself, and its positions continue from the prefix. Loss and gradients are
those of separate rows, while 576 image tokens, the vision tower and the decoding of the picture are paid once per
image. Prefix Grouper (arXiv 2506.05433) shows the same for GRPO. `kernels/shared_prefix_attention.py` has the
attention.
"""

import itertools
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig
from trl.data_utils import prepare_multimodal_messages

from finetuning.arguments import ScriptArguments
from finetuning.data.collator import (
    IMAGE_LINE,
    LlavaDataCollator,
    image_token_of,
    leading_marks,
    tokenize,
    tokens_of_images,
)
from finetuning.data.image_tiles import views_of
from finetuning.families import family_of, is_vision

# Values of `branch_ids`: dialogues are numbered from FIRST_BRANCH on.
PADDING, PREFIX, FIRST_BRANCH = 0, 1, 2


def uses_shared_prefix(script_args: ScriptArguments, rows: Dataset, config: PreTrainedConfig) -> bool:
    """`share_image_prefix` of the recipe; if it is not set, whether the model can and an image of `rows` has several dialogues.

    Raises ValueError where the recipe wants it and the model cannot.
    """
    can = family_of(config).shares_prefix if is_vision(config) else True
    if script_args.share_image_prefix and not can:
        raise ValueError(
            f"share_image_prefix: the image tokens of {config.model_type} see one another, which dialogues behind one prefix "
            "are not tried with: remove it, and they train as rows of their own"
        )
    if script_args.share_image_prefix is not None or not can:
        return bool(script_args.share_image_prefix)
    return "image_id" in rows.column_names and pc.count_distinct(column_of(rows, "image_id"), mode="all").as_py() < len(
        rows
    )


def group_by_image(dataset: Dataset, max_dialogues: int = 8) -> Dataset:
    """Rows with the same `image_id` -> one row with `messages` (the first dialogue), `other_messages`, `images`, `row`.

    `row` is the number of the first row in `dataset`. An image with more than `max_dialogues` dialogues becomes several
    rows, which bounds the length of a sequence. A row without images, or with images in later turns, is not grouped.
    Pictures are decoded lazily, once per grouped row.
    """
    sizes, has_marks = texts_of_rows(dataset)
    rows_of: dict[Any, list[int]] = defaultdict(list)
    columns = column_of(dataset, "image_id").to_pylist(), files_of_images(dataset), has_marks
    for row, (image_id, files, marks) in enumerate(zip(*columns, strict=True)):
        # Rows may begin with one image and go on with others, or show theirs in later turns.
        rows_of[("alone", row) if marks or not files else (image_id, *files)].append(row)
    groups = [
        rows[start : start + max_dialogues] for rows in rows_of.values() for start in range(0, len(rows), max_dialogues)
    ]
    characters = [sum(sizes[row] for row in rows) for rows in groups]
    grouped = Dataset.from_dict({"rows": groups, "characters": characters}, split=dataset.split)
    grouped.info.dataset_name = dataset.info.dataset_name
    grouped.set_transform(partial(read_grouped_rows, dataset))
    return grouped


def column_of(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow holds it, the chosen rows in their order."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def texts_of_rows(dataset: Dataset) -> tuple[list[int], list[bool]]:
    """For each row the characters of its messages, and whether one begins with a mark of an image. No text becomes Python's."""
    sizes: list[int] = []
    has_marks: list[bool] = []
    for messages in column_of(dataset, "messages").chunks:
        contents = pc.struct_field(messages.flatten(), "content")
        counts = pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(counts)
        sums = []
        for values in (pc.utf8_length(contents), pc.starts_with(contents, IMAGE_LINE).cast("int32")):
            total = np.concatenate(
                [[0], np.cumsum(pc.fill_null(values, 0).to_numpy(zero_copy_only=False), dtype=np.int64)]
            )
            sums.append(total[ends] - total[ends - counts])
        sizes += sums[0].tolist()
        has_marks += (sums[1] > 0).tolist()
    return sizes, has_marks


def files_of_images(dataset: Dataset) -> list[list[tuple[str | None, int | None]]]:
    """For each row (name, size in bytes) of its pictures as they are stored. No picture is read for it."""
    rows: list[list[tuple[str | None, int | None]]] = []
    for images in dataset.with_format("arrow")["images"].chunks:
        stored = images.flatten()
        sizes = pc.binary_length(pc.struct_field(stored, "bytes")).to_pylist()
        files = list(zip(pc.struct_field(stored, "path").to_pylist(), sizes, strict=True))
        lengths = pc.fill_null(pc.list_value_length(images), 0).to_pylist()
        ends = itertools.accumulate(lengths)
        rows += [files[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return rows


def read_grouped_rows(dataset: Dataset, batch: dict[str, list]) -> dict[str, list]:
    """Transform of the grouped dataset: row numbers of `dataset` -> dialogues, pictures and the first number."""
    texts = dataset.select_columns([name for name in dataset.column_names if name != "images"])
    dialogues = [texts[rows]["messages"] for rows in batch["rows"]]
    return {
        "messages": [messages[0] for messages in dialogues],
        "other_messages": [messages[1:] for messages in dialogues],
        "images": [dataset[rows[0]]["images"] for rows in batch["rows"]],
        "row": [rows[0] for rows in batch["rows"]],
    }


class SharedPrefixCollator(LlavaDataCollator):
    """Rows of `group_by_image` -> one batch of sequences, each an image prefix and its dialogues.

    `input_ids`, `labels`, `attention_mask`, `position_ids` and `branch_ids` are (sequences, tokens), right-padded.
    `pixel_values` holds each picture once. `prefix_length` (int, tokens) is set if all prefixes are of one length. As
    in any batch, a position predicts the label of the next position, whose own token may belong to the next dialogue.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of `group_by_image` -> a batch, as the class says."""
        batch = super().__call__(examples)
        image_token = image_token_of(self.processor)
        sequences = []
        for position, example in enumerate(examples):
            real = batch["attention_mask"][position].bool()
            tokens, labels = batch["input_ids"][position][real], batch["labels"][position][real]
            image_places = (tokens == image_token).nonzero()
            prefix = int(image_places[-1]) + 1 if len(image_places) else 0
            if any(leading_marks(message)[0] for message in example["messages"]):
                prefix = 0  # its later pictures come after answers, and such a row is alone
            dialogues = [(tokens, labels)]
            images = (example.get("images") or []) * views_of(self.processor)  # as many as are shown; none is opened
            of_images = tokens_of_images(tokens, image_token, len(images))
            for messages in example.get("other_messages", []):
                messages = prepare_multimodal_messages(messages, images=images)
                dialogues.append(tokenize(self.processor, messages, of_images))
            sequences.append(join_dialogues(dialogues, prefix, example.get("row")))
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(sequence["input_ids"]) for sequence in sequences) // multiple) * multiple
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        for name in sequences[0]:
            rows = torch.full((len(sequences), length), padding.get(name, 0))
            for row, sequence in zip(rows, sequences, strict=True):
                row[: len(sequence[name])] = sequence[name]
            batch[name] = rows
        prefixes = {int((branch_ids == PREFIX).sum()) for branch_ids in batch["branch_ids"]}
        if len(prefixes) == 1 and prefixes != {0}:
            batch["prefix_length"] = prefixes.pop()
        return batch


def join_dialogues(dialogues: list[tuple[Tensor, Tensor]], prefix: int, row: int | None) -> dict[str, Tensor]:
    """(token ids, labels) of each dialogue, the first `prefix` tokens in common -> one sequence with branches.

    Returns `input_ids`, `labels`, `attention_mask`, `position_ids` and `branch_ids`, each (tokens,). The last token of
    a dialogue predicts nothing and no other dialogue sees it, so only the last dialogue keeps it. Its label takes the
    position of the next dialogue's first label, which is always -100.

    Raises ValueError, naming `row`, if the dialogues begin differently, or if the first token after the prefix is
    supervised: the end of another dialogue would predict it.
    """
    first = dialogues[0][0]
    for tokens, labels in dialogues:
        if not torch.equal(tokens[:prefix], first[:prefix]):
            raise ValueError(
                f"row {row}: dialogues about one image begin differently (another system message, or text before the "
                "image): set share_image_prefix: false, or give these rows an image_id of their own"
            )
        if (labels[:prefix] != -100).any() or (len(dialogues) > 1 and labels[prefix] != -100):
            raise ValueError(
                f"row {row}: an answer comes before or directly after the image; it must follow a question"
            )
    *others, last = [tokens[prefix:] for tokens, _ in dialogues]
    branches = [*(tokens[:-1] for tokens in others), last]
    return {
        "input_ids": torch.cat([first[:prefix], *branches]),
        "labels": torch.cat([dialogues[0][1], *(labels[prefix + 1 :] for _, labels in dialogues[1:])]),
        "attention_mask": torch.ones(prefix + sum(map(len, branches)), dtype=torch.long),
        "position_ids": torch.cat([torch.arange(prefix), *(prefix + torch.arange(len(branch)) for branch in branches)]),
        "branch_ids": torch.cat(
            [torch.full((prefix,), PREFIX)]
            + [torch.full((len(branch),), FIRST_BRANCH + number) for number, branch in enumerate(branches)]
        ),
    }
