"""Rows about one image become one sequence: grouped, read once, token for token what separate rows are."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from finetuning.data.collator import LlavaDataCollator
from finetuning.data.shared_prefix import PREFIX, SharedPrefixCollator, group_by_image
from finetuning.models.processing import load_processing_class


def questions(*image_ids: str) -> Dataset:
    pictures = {name: Picture.new("RGB", (40, 30), (20 * number, 90, 60)) for number, name in enumerate("abc")}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How many people are in view? ({number})"},
                {"role": "assistant", "content": f"{number} people."},
            ],
            "images": [pictures[image_id]] if image_id else [],
            "image_id": image_id,
        }
        for number, image_id in enumerate(image_ids)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(message), "images": List(Image()), "image_id": Value("string")})
    return Dataset.from_list(rows, features=features)


def test_rows_are_grouped_by_image():
    grouped = group_by_image(questions("a", "b", "a", "", "a", ""), max_dialogues=2)
    assert len(grouped) == 5
    assert [row["row"] for row in grouped] == [0, 4, 1, 3, 5]
    assert [1 + len(row["other_messages"]) for row in grouped] == [2, 1, 1, 1, 1]
    assert grouped[0]["other_messages"][0][0]["content"] == "How many people are in view? (2)"
    assert [len(row["images"]) for row in grouped] == [1, 1, 1, 0, 0]


def test_rows_that_go_on_with_other_images_are_no_group():
    row = questions("a", "b")
    two = row[0] | {"images": [row[0]["images"][0], row[1]["images"][0]]}
    rows = Dataset.from_list([row[0], two, row[0]], features=row.features)
    assert [(group["row"], len(group["other_messages"])) for group in group_by_image(rows)] == [(0, 1), (1, 0)]


@pytest.fixture(scope="module")
def processor(tiny_llava):
    return load_processing_class(str(tiny_llava))


def test_collator_reads_each_image_once_and_writes_what_separate_rows_are(processor):
    dataset = questions("a", "b", "a", "a", "")
    batch = SharedPrefixCollator(processor)(list(group_by_image(dataset)))
    separate = LlavaDataCollator(processor)([dataset[row] for row in (0, 2, 3, 1, 4)])
    assert batch["pixel_values"].shape[0] == 2
    longest = int((batch["branch_ids"] > 0).sum(1).max())
    assert batch["input_ids"].shape[1] == longest
    rebuilt = []
    for tokens, labels, branches in zip(batch["input_ids"], batch["labels"], batch["branch_ids"], strict=True):
        predicted = torch.nn.functional.pad(labels[1:], (0, 1), value=-100)
        for branch in range(2, int(branches.max()) + 1):
            mine = (branches == PREFIX) | (branches == branch)
            rebuilt.append((tokens[mine].tolist(), predicted[mine].tolist()))
    expected = []
    for number, (tokens, labels, mask) in enumerate(
        zip(separate["input_ids"], separate["labels"], separate["attention_mask"], strict=True)
    ):
        tokens, labels = tokens[mask == 1].tolist(), labels[mask == 1].tolist()
        ends_the_sequence = number in (2, 3, 4)  # the third about "a", the one about "b", the one without an image
        assert labels[-1] != -100
        expected.append((tokens, [*labels[1:], -100]) if ends_the_sequence else (tokens[:-1], labels[1:]))
    assert rebuilt == expected
    padded = SharedPrefixCollator(processor, pad_to_multiple_of=longest + 1)(list(group_by_image(dataset)))
    assert all(padded[name].shape == (3, longest + 1) for name in ("input_ids", "labels", "branch_ids"))
    assert torch.equal(padded["input_ids"][:, :longest], batch["input_ids"])
    assert "prefix_length" not in batch  # the row without an image has none
    assert SharedPrefixCollator(processor)([group_by_image(dataset)[0]])["prefix_length"] == int(
        (batch["branch_ids"][0] == PREFIX).sum()
    )
