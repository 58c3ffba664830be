"""The one place that makes batches of images and dialogues: for training, and for asking."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature, DataCollator, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


class LlavaDataCollator(DataCollatorForVisionLanguageModeling):
    """Rows with `messages` and `images` -> one right-padded training batch, supervised on the assistant's turns only.

    Called on a list of rows it returns TRL's batch: `input_ids`, `attention_mask`, `labels` of shape
    (rows, tokens) and `pixel_values` of shape (images, 3, height, width). `labels` are -100 everywhere but on the
    assistant's text and its end-of-sequence token. A row that carries its number in the dataset (`row`) keeps it
    in `rows`, so that a bad batch can be named. Nothing is ever cut: a cut image token makes the row useless. Rows are
    padded to the longest, or to a multiple of `pad_to_multiple_of`.
    """

    def __init__(self, processor: ProcessorMixin, pad_to_multiple_of: int | None = None):
        super().__init__(
            processor=processor, max_length=None, assistant_only_loss=True, pad_to_multiple_of=pad_to_multiple_of
        )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            self.refuse_image_marks(example)
        batch = super().torch_call(examples)
        if "row" in examples[0]:
            batch["rows"] = [example["row"] for example in examples]
        return batch

    def refuse_image_marks(self, example: dict[str, Any]) -> None:
        mark = self.processor.image_token
        for message in chain(example["messages"], *example.get("other_messages", [])):
            if mark in str(message["content"]):
                raise ValueError(
                    f"row {example.get('row', '(unnumbered)')}: {mark} in the text: {str(message['content'])[:80]!r}. Remove it "
                    "there: the collator puts one before the text for each picture"
                )

    def prompts(self, examples: list[dict[str, Any]]) -> BatchFeature:
        """Rows whose `messages` end with a user turn -> one left-padded batch to generate from.

        Token for token the beginning of what training sees, which the tests and the data check assert.
        """
        return self.processor.apply_chat_template(
            [prepare_multimodal_messages(example["messages"], images=example.get("images")) for example in examples],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
        )


def prompt_batch(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]
) -> BatchFeature:
    """Rows whose `messages` end with a user turn -> one left-padded batch (images too, for a vision model)."""
    if isinstance(processing_class, ProcessorMixin):
        return LlavaDataCollator(processing_class).prompts(list(rows))
    return processing_class.apply_chat_template(
        [row["messages"] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )


def stop_tokens(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the tokenizer's own, and Gemma's ends of a turn and of a document."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokens = sorted({tokenizer.eos_token, "<end_of_turn>", "<eos>"})
    # An unknown token becomes the unknown id; asking for the vocabulary itself would copy 256,000 entries.
    return [
        number for number in tokenizer.convert_tokens_to_ids(tokens) if number not in (None, tokenizer.unk_token_id)
    ]


class CollateSupervisedRows:
    """A collator's batch, and `supervised_rows`: positions in the flattened (rows * tokens) whose next is supervised."""

    def __init__(self, collate: DataCollator):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        batch["supervised_rows"] = (next_labels(batch["labels"]) != -100).nonzero().flatten()
        return batch


def next_labels(labels: Tensor) -> Tensor:
    """(rows, tokens) -> (rows * tokens): the label that each position predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
