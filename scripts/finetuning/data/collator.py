"""The one place that makes batches of images and dialogues: for training, and for asking."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    BatchFeature,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl.data_utils import prepare_multimodal_messages

from finetuning import upstream
from finetuning.data.image_tiles import num_views, tiles_of, with_tiles
from finetuning.data.pictures import PictureError, open_pictures
from finetuning.data.pixel_table import pixel_values
from finetuning.families import family_of


def mask_by_lists(self: ProcessorMixin, processed_dict: dict[str, Any], generation_indices: list[list[int]]) -> Any:
    """transformers' own, given plain lists: it walks through the offsets of every token, image tokens included, and of a
    tensor each would be a tensor of its own (576 image tokens a row: a third of the loader's time)."""
    offsets = [torch.as_tensor(of_row).tolist() for of_row in processed_dict["offset_mapping"]]
    processed_dict["offset_mapping"] = offsets
    return mask_by_offsets(self, processed_dict, generation_indices)


mask_by_offsets = upstream.replace(ProcessorMixin, "_adjust_assistant_masks_indices", mask_by_lists)

# What preparation writes at the start of a user turn for each picture that it shows, where pictures come in later turns.
IMAGE_LINE = "<image>\n"


class LlavaDataCollator:
    """Rows with `messages` and `images` -> one right-padded training batch, supervised on the assistant's turns only.

    `images` are whatever `open_picture` opens: what a dataset stores, paths, or Pillow images.

    Called on a list of rows it returns the batch of TRL's `DataCollatorForVisionLanguageModeling`, with which TRL's Trainer
    and PEFT would be imported: `input_ids`, `attention_mask`, `labels` of shape
    (rows, tokens) and what the family makes of pictures (`Family.picture_inputs`): `pixel_values` (images, 3, height,
    width), or (images, most tiles, 3, height, width) with `image_sizes` as lists [height, width]. `labels` are -100
    everywhere but on the assistant's text and its end-of-sequence token. A row that carries its number in the dataset (`row`) keeps it
    in `rows`, so that a bad batch can be named. Nothing is ever cut: a cut image token makes the row useless. Rows are
    padded to the longest, or to a multiple of `pad_to_multiple_of`. With the model's `config` each row's image tokens are
    compared with the features that the model will make of its pictures; the model itself compares a batch's totals.
    """

    def __init__(
        self, processor: ProcessorMixin, pad_to_multiple_of: int | None = None, config: PreTrainedConfig | None = None
    ):
        self.processor = processor
        self.pad_to_multiple_of = pad_to_multiple_of
        self.config = config

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows -> a batch, with the numbers of its rows under `rows`. Raises ValueError for an image mark in a text."""
        for example in examples:
            self.refuse_image_marks(example)
        tiles = tiles_of(self.processor)
        examples = [with_pictures(example, tiles) for example in examples]
        once = isinstance(self.processor, LlavaProcessor | LlavaNextProcessor | LlavaOnevisionProcessor)
        batch = self.read_texts_once(examples) if once else self.read_texts(examples)
        for name in ("image_sizes", "batch_num_images"):
            if name in batch:  # read by the host, tile by tile: on a GPU each would have to be waited for
                batch[name] = torch.as_tensor(batch[name]).tolist()
        if self.config is not None and "pixel_values" in batch:
            self.refuse_other_features(batch, examples)
        if "row" in examples[0]:
            batch["rows"] = [example["row"] for example in examples]
        return batch

    def read_texts(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of rows with open pictures, by any processor."""
        batch = self._apply_template(
            examples,
            return_assistant_tokens_mask=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        supervised = (batch.pop("assistant_masks") != 0) & (batch["attention_mask"] != 0)
        batch["labels"] = batch["input_ids"].masked_fill(~supervised, -100)
        return batch

    def read_texts_once(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of rows with open pictures, each picture's tokens put in after its text is tokenized.

        TRL writes every image token into the text, and has it tokenized and searched for the answers: at 1,024 of them a
        row that takes three times as long as the picture.
        """
        pictures = [example["images"] for example in examples if example["images"]]
        nested = isinstance(self.processor, LlavaOnevisionProcessor)  # which counts the pictures of each row
        batch: dict[str, Any] = {}
        if pictures:
            if isinstance(self.processor, LlavaProcessor):
                batch = pixel_values(self.processor.image_processor, list(chain(*pictures)))
            else:
                flat = pictures if nested else list(chain(*pictures))
                batch = self.processor.image_processor(flat, return_tensors="pt")
        dialogues = []
        for example in examples:
            messages = prepare_multimodal_messages(example["messages"], images=example["images"])
            dialogues.append(tokenize(self.processor, messages, expected_tokens(self.processor, example["images"])))
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(tokens) for tokens, _ in dialogues) // multiple) * multiple
        batch["input_ids"] = torch.full((len(examples), length), self.processor.tokenizer.pad_token_id)
        batch["labels"] = torch.full((len(examples), length), -100)
        batch["attention_mask"] = torch.zeros(len(examples), length, dtype=torch.long)
        for row, (tokens, labels) in enumerate(dialogues):
            batch["input_ids"][row, : len(tokens)] = tokens
            batch["labels"][row, : len(tokens)] = labels
            batch["attention_mask"][row, : len(tokens)] = 1
        return batch

    def refuse_other_features(self, batch: dict[str, Any], examples: list[dict[str, Any]]) -> None:
        """Raise ValueError for a row whose image tokens are not as many as the features of its pictures."""
        sizes = [[(image.height, image.width) for image in example["images"]] for example in examples]
        if "image_sizes" in batch and batch["image_sizes"] != [list(size) for of_row in sizes for size in of_row]:
            raise ValueError(f"image_sizes {batch['image_sizes']} are not those of the rows' pictures: {sizes}")
        family, processed = family_of(self.config), tuple(batch["pixel_values"].shape[-2:])
        for example, of_row, tokens in zip(examples, sizes, batch["input_ids"], strict=True):
            num_tokens = int((tokens == image_token_of(self.processor)).sum())
            num_features = sum(family.features_of_row(self.config, of_row, processed))
            if num_tokens != num_features:
                raise ValueError(
                    f"row {example.get('row', '(unnumbered)')}: {num_tokens} image tokens, and the model makes {num_features} "
                    "features of its pictures: use the processor that belongs to the model"
                )

    def refuse_image_marks(self, example: dict[str, Any]) -> None:
        """Raise ValueError where a message holds the image mark, which the collator itself puts in."""
        mark = self.processor.image_token
        for message in chain(example["messages"], *example.get("other_messages", [])):
            num_marks, text = leading_marks(message)
            if mark in text or (num_marks and message["role"] != "user"):
                raise ValueError(
                    f"row {example.get('row', '(unnumbered)')}: {mark} in the text: {str(message['content'])[:80]!r}. Remove it "
                    "there: the collator puts one before the text for each picture"
                )

    def prompts(self, examples: list[dict[str, Any]]) -> BatchFeature:
        """Rows whose `messages` end with a user turn -> one left-padded batch to generate from.

        Token for token the beginning of what training sees, which the tests and the data check assert.
        """
        tiles = tiles_of(self.processor)
        rows = (with_pictures(until_the_question(example), tiles) for example in examples)
        return self._apply_template(rows, add_generation_prompt=True, padding_side="left")

    def _apply_template(
        self,
        examples: Iterable[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
        **padding: Any,
    ) -> BatchFeature:
        return self.processor.apply_chat_template(
            [prepare_multimodal_messages(example["messages"], images=example["images"]) for example in examples],
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "add_special_tokens": False, **padding},
        )


def tokenize(
    processor: ProcessorMixin, messages: list[dict[str, Any]], tokens_of_images: list[int], *, prompt: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both (tokens,), of a dialogue whose pictures become `tokens_of_images` tokens, in order.

    What the collator makes of it, without reading a picture. `messages` are as `prepare_multimodal_messages` gives them.
    With `prompt` they end with a question, and nothing is supervised.
    """
    written_out = hasattr(processor, "full_image_sequence")
    encoded = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=with_written_pictures(processor) if written_out else processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=not prompt,
        add_generation_prompt=prompt,
        add_special_tokens=False,
    )
    tokens = torch.tensor(encoded["input_ids"])
    supervised = torch.tensor(encoded["assistant_masks"]) if not prompt else torch.zeros_like(tokens)
    if written_out:
        return tokens, torch.where(supervised == 1, tokens, -100)
    repeats = torch.ones_like(tokens)
    repeats[tokens == image_token_of(processor)] = torch.tensor(tokens_of_images, dtype=repeats.dtype)
    labels = torch.where(supervised == 1, tokens, -100)
    return tokens.repeat_interleave(repeats), labels.repeat_interleave(repeats)


def expected_tokens(processor: ProcessorMixin, pictures: Sequence[Image.Image]) -> list[int]:
    """How many tokens the processor writes for each of a row's pictures."""
    if isinstance(processor, LlavaOnevisionProcessor) and len(pictures) > 1:
        return [processor.num_image_tokens + 1] * len(pictures)  # one view and a newline each
    sizes = [(picture.height, picture.width) for picture in pictures]
    return processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]


def image_token_of(processor: ProcessorMixin) -> int:
    """Id of the tokens that are replaced by a picture's features; Gemma 3's mark in a text is another token."""
    return processor.image_token_ids[0]


def with_written_pictures(processor: ProcessorMixin) -> str:
    """The template of a Gemma 3, with all tokens of a picture where its mark stands; the line breaks around them belong to
    the text. Raises ValueError for a template that writes the mark in another way."""
    written = json.dumps(processor.full_image_sequence)
    template, count = re.subn(
        f"(['\"]){re.escape(processor.image_token)}\\1", lambda _: written, processor.chat_template
    )
    if not count:
        raise ValueError(
            f"the chat template does not write {processor.image_token} as a text of its own, as gemma3.jinja does"
        )
    return template


def tokens_of_images(tokens: Tensor, image_token: int, num_images: int) -> list[int]:
    """How many of the dialogue's `tokens` (tokens,) each of its pictures takes, in order.

    The project's templates write each picture by itself. Of pictures that a template of somebody else's writes side by side
    each gets the same share, which is right where all are of one size.
    """
    is_image = F.pad((tokens == image_token).int(), (1, 1)).diff()
    runs = ((is_image == -1).nonzero() - (is_image == 1).nonzero()).flatten().tolist()
    return runs if len(runs) == num_images else [sum(runs) // num_images] * num_images


def leading_marks(message: dict[str, Any]) -> tuple[int, str]:
    """(how many lines `<image>` a message begins with, its text after them). Preparation writes them where pictures stand
    in later turns; without any, all pictures of a row stand before its first question."""
    text = str(message["content"])
    num_marks = 0
    while text.startswith(IMAGE_LINE):
        text = text.removeprefix(IMAGE_LINE)
        num_marks += 1
    return num_marks, text


def place_images(messages: list[dict[str, Any]], views: int = 1) -> list[dict[str, Any]]:
    """Messages whose texts begin with lines `<image>` -> typed parts, the images where the lines stood; others as given.

    Each line stands for so many `views` of its picture.
    """
    marks = [leading_marks(message) for message in messages]
    if not any(number for number, _ in marks):
        return messages
    return [
        message | {"content": [*({"type": "image"} for _ in range(number * views)), {"type": "text", "text": text}]}
        for message, (number, text) in zip(messages, marks, strict=True)
    ]


def until_the_question(example: dict[str, Any]) -> dict[str, Any]:
    """A row that was cut before an answer, without the images of the turns that were cut off."""
    num_shown = sum(number for number, _ in map(leading_marks, example["messages"]))
    return example | {"images": (example.get("images") or [])[: num_shown or None]}


def with_pictures(example: dict[str, Any], tiles: tuple[int, int] | None = None) -> dict[str, Any]:
    """The row with its pictures opened, each followed by its tiles, and placed. Raises ValueError that names row and picture."""
    try:
        opened = open_pictures(example.get("images") or [])
    except PictureError as error:
        raise ValueError(f"row {example.get('row', '(unnumbered)')}, {error}") from error
    messages = place_images(example["messages"], num_views(tiles))
    return example | {"images": with_tiles(opened, tiles), "messages": messages}


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
    """Ids that end an answer: the tokenizer's own, Gemma's ends of a turn and of a document, Llama 3's of a turn."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokens = sorted({tokenizer.eos_token, "<end_of_turn>", "<eos>", "<|eot_id|>"})
    # An unknown token becomes the unknown id; asking for the vocabulary itself would copy 256,000 entries.
    return [
        number for number in tokenizer.convert_tokens_to_ids(tokens) if number not in (None, tokenizer.unk_token_id)
    ]


class CollateSupervisedRows:
    """A collator's batch, and `supervised_rows`: positions in the flattened (rows * tokens) whose next is supervised.

    `num_supervised` (rows,) says how many of them each row has, packed rows included, which lie one behind the other.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        is_supervised = next_labels(batch["labels"]) != -100
        batch["supervised_rows"] = is_supervised.nonzero().flatten()
        if len(batch["labels"]) == len(examples):
            of_rows = is_supervised.view(len(examples), -1)
        else:  # rows lie one behind the other, padding (`pad_to_multiple_of`) behind the last
            lengths = [len(example["input_ids"]) for example in examples[:-1]]
            of_rows = is_supervised.split([*lengths, len(is_supervised) - sum(lengths)])
        batch["num_supervised"] = torch.stack([of_row.sum() for of_row in of_rows])
        return batch


def next_labels(labels: Tensor) -> Tensor:
    """(rows, tokens) -> (rows * tokens): the label that each position predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
