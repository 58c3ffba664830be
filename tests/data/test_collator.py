"""What the collator makes of pictures in later turns, of turns that are not learnt, and of odd pictures."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from finetuning.data.collator import LlavaDataCollator, mask_by_lists, mask_by_offsets, prompt_batch, with_pictures
from finetuning.data.dataset import open_dataset
from finetuning.data.label_audit import Auditor
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image
from finetuning.inference.session import open_image
from finetuning.models.processing import load_config, load_processing_class


@pytest.fixture(scope="module")
def processor(tiny_llava):
    return load_processing_class(str(tiny_llava))


def turn(role: str, content: str, **other) -> dict:
    return {"role": role, "content": content, **other}


def flat(colour: str) -> Picture.Image:
    return Picture.new("RGB", (64, 64), colour)


LATER = [
    turn("user", "<image>\nHow many?"),
    turn("assistant", "One."),
    turn("user", "<image>\n<image>\nAnd here?"),
    turn("assistant", "Two."),
]


def test_pictures_stand_in_the_turns_that_show_them(processor):
    images = [flat("red"), flat("green"), flat("blue")]
    batch = LlavaDataCollator(processor)([{"messages": LATER, "images": images}])
    ids = batch["input_ids"][0]
    text = processor.decode([token for token in ids.tolist() if token != processor.image_token_id])
    assert "USER: \nHow many? ASSISTANT: One.</s>USER: \n\nAnd here? ASSISTANT: Two.</s>" in text
    places = (ids == processor.image_token_id).nonzero().flatten()
    per_image = len(places) // 3
    breaks = (places.diff() > 1).nonzero().flatten().tolist()
    assert breaks == [per_image - 1, 2 * per_image - 1]
    first_answer = int((batch["labels"][0] != -100).nonzero()[0])
    assert places[per_image - 1] < first_answer < places[per_image]
    # Asked before the second answer all three are shown, before the first one only the first.
    assert prompt_batch(processor, [{"messages": LATER[:3], "images": images}])["pixel_values"].shape[0] == 3
    before = prompt_batch(processor, [{"messages": LATER[:1], "images": images}])
    assert before["pixel_values"].shape[0] == 1
    assert before["input_ids"][0].tolist() == ids[: before["input_ids"].shape[1]].tolist()


def test_later_pictures_are_refused_where_they_are_too_few_or_in_an_answer(processor):
    with pytest.raises(ValueError, match="does not match number of image placeholders"):
        LlavaDataCollator(processor)([{"messages": LATER, "images": [flat("red")] * 2}])
    for text in ("<image>\nYes.", "Yes, <image>"):
        with pytest.raises(ValueError, match=r"row 7: <image> in the text"):
            LlavaDataCollator(processor)(
                [{"messages": [turn("user", "Is it?"), turn("assistant", text)], "images": [flat("red")], "row": 7}]
            )


def test_rows_with_later_pictures_are_alone_where_dialogues_share_an_image(processor):
    stored = [{"bytes": encoded(flat(colour)), "path": f"{colour}.png"} for colour in ("red", "green", "blue")]
    short = [turn("user", "How many?"), turn("assistant", "One.")]
    rows = [
        {"messages": LATER, "images": stored, "image_id": "red.png"},
        {"messages": short, "images": stored[:1], "image_id": "red.png"},
        {"messages": [*short[:1], turn("assistant", "1")], "images": stored[:1], "image_id": "red.png"},
    ]
    dataset = Dataset.from_list(rows)
    grouped = list(group_by_image(dataset))
    assert [(row["row"], len(row["other_messages"])) for row in grouped] == [(0, 0), (1, 1)]
    shared = SharedPrefixCollator(processor)(grouped[:1])
    alone = LlavaDataCollator(processor)(rows[:1])
    assert torch.equal(shared["input_ids"], alone["input_ids"])
    assert torch.equal(shared["labels"], alone["labels"])


def test_a_turn_of_weight_0_is_read_and_not_learnt(processor, tiny_gemma, tiny_llava):
    messages = [
        turn("user", "Two and two?", weight=1),
        turn("assistant", "Five.", weight=0),
        turn("user", "Sure?", weight=1),
        turn("assistant", "Four.", weight=1),
    ]
    batch = LlavaDataCollator(processor)([{"messages": messages, "images": []}])
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    assert processor.decode(labels[labels != -100]).strip() == "Four.</s>"
    assert "ASSISTANT: Five.</s>USER: Sure?" in processor.decode(ids)
    tokenizer = load_processing_class(str(tiny_gemma))
    encoded_row = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learnt = [i for i, mask in zip(encoded_row["input_ids"], encoded_row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(learnt) == "Four.<end_of_turn>"
    for model, processing_class in ((tiny_llava, processor), (tiny_gemma, tokenizer)):
        (audit,) = Auditor(processing_class, load_config(str(model)))([{"messages": messages}])
        assert audit.faults == []


def encoded(picture: Picture.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    """A sideways phone picture, 16 bits, float, transparency, a palette."""
    shades = np.random.default_rng(0).integers(0, 256, (30, 48, 3), dtype=np.uint8)
    exif = Picture.Exif()
    exif[274] = 6
    deep = shades[..., 0].astype(np.uint16) * 40 + 2000
    clear = Picture.fromarray(np.dstack([shades, np.full((30, 48), 90, np.uint8)]))
    return {
        "phone.jpg": encoded(Picture.fromarray(shades), "JPEG", exif=exif),
        "deep.png": encoded(Picture.fromarray(deep)),
        "float.tif": encoded(Picture.fromarray((deep / 9000).astype(np.float32)), "TIFF"),
        "clear.png": encoded(clear),
        "clear.gif": encoded(Picture.fromarray(shades).quantize(8), "GIF", transparency=3),
    }


def test_training_and_asking_see_the_same_pixels_to_the_last_bit(processor, tmp_path):
    pictures = odd_pictures()
    rows = [
        {
            "messages": [turn("user", "What is shown?"), turn("assistant", name)],
            "images": [{"bytes": data, "path": name}],
        }
        for name, data in pictures.items()
    ]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(message), "images": List(Image())})
    DatasetDict(train=Dataset.from_list(rows, features=features)).save_to_disk(tmp_path / "data")
    train = open_dataset(str(tmp_path / "data"), vision=True)["train"]
    trained = LlavaDataCollator(processor)([train[row] for row in range(len(train))])["pixel_values"]
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    asked = [
        {"messages": [turn("user", "What is shown?")], "images": [open_image(str(tmp_path / name))]}
        for name in pictures
    ]
    assert torch.equal(trained, prompt_batch(processor, asked)["pixel_values"])
    # The 16-bit and the float picture show the same; nothing else does.
    assert len({pixels.numpy().tobytes() for pixels in trained}) == len(pictures) - 1


@pytest.mark.parametrize("multiple", [None, 16])
def test_texts_tokenized_once_make_the_batch_that_trl_makes(processor, multiple):
    rows = [
        {"messages": [turn("user", "How many?"), turn("assistant", "23 people.")], "images": [flat("red")], "row": 4},
        {"messages": LATER, "images": [flat("red"), flat("blue"), flat("green")], "row": 5},
        {"messages": [turn("user", "Hello"), turn("assistant", "사람이 없습니다.")], "images": [], "row": 6},
    ]
    collate = LlavaDataCollator(processor, pad_to_multiple_of=multiple)
    trls = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, pad_to_multiple_of=multiple)
    opened = [with_pictures(row) for row in rows]
    expected, once, by_any_processor = trls(opened), collate(rows), collate.read_texts(opened)
    assert once.pop("rows") == [4, 5, 6]
    assert set(once) == set(by_any_processor) == set(expected)
    for name, values in expected.items():
        assert torch.equal(once[name], values) and torch.equal(by_any_processor[name], values), name


class Operations(TorchDispatchMode):
    """How many operations on tensors there are."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_answers_are_found_in_lists_as_in_tensors(processor):
    ids = torch.arange(12)[None]
    offsets = torch.stack([torch.arange(12) * 2, torch.arange(12) * 2 + 2], dim=-1)[None]
    marked = [
        adjust(processor, {"offset_mapping": offsets.clone(), "input_ids": ids}, [[(4, 9), (15, 20)]])
        for adjust in (mask_by_lists, mask_by_offsets)
    ]
    with Operations() as operations:
        processor._adjust_assistant_masks_indices({"offset_mapping": offsets, "input_ids": ids}, [[(4, 9)]])
    assert operations.number < ids.shape[1]  # none for each token
    assert marked[0]["assistant_masks"] == marked[1]["assistant_masks"]
    assert marked[0]["assistant_masks"][0] == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
