"""A picture and its tiles as several pictures of one row: nothing is lost, and every reader of a row counts them alike."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from finetuning.data.collator import LlavaDataCollator, prompt_batch
from finetuning.data.count_tree import AnswerForm
from finetuning.data.dataset import open_dataset
from finetuning.data.image_tiles import parse_tiles, tile_boxes, tiles_of, with_tiles
from finetuning.data.label_audit import Auditor
from finetuning.data.shared_prefix import SharedPrefixCollator
from finetuning.inference.count_distribution import CountReader, read_by_transformers, read_counts
from finetuning.inference.prompt_reader import PromptReader
from finetuning.model_shape import ModelShape
from finetuning.models.loading import load_for_inference
from finetuning.models.processing import load_config, load_processing_class, load_saved_processing_class
from finetuning.preflight.planner import picture_cost
from finetuning.preflight.row_lengths import RowCounter, lengths_of, read_split


@pytest.fixture(scope="module")
def tiled(tiny_llava):
    return load_processing_class(str(tiny_llava), image_tiles="2x2")


def row(number: int, size: tuple[int, int] = (90, 64)) -> dict:
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    turns = [{"role": "user", "content": "How many people are in view?"}, {"role": "assistant", "content": "7 people."}]
    return {"messages": turns, "images": [Image.fromarray(noise)], "row": number}


@pytest.mark.parametrize("size", [(640, 480), (97, 61), (3, 2), (1, 1)])
@pytest.mark.parametrize("tiles", [(2, 2), (3, 2), (1, 4)])
def test_tiles_cover_the_picture_row_by_row_and_neighbours_overlap(size, tiles):
    boxes = tile_boxes(size, tiles)
    seen = np.zeros((size[1], size[0]), int)
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]
        seen[upper:lower, left:right] += 1
    assert seen.min() >= 1
    assert [box[1::-1] for box in boxes] == sorted(box[1::-1] for box in boxes)  # upper, left
    if size == (640, 480):
        columns = tiles[0]
        for first, second in itertools.pairwise(boxes):
            if first[1] == second[1]:
                assert first[2] - second[0] == pytest.approx(0.1 * (first[2] - first[0]), abs=2)
        assert len(boxes) == columns * tiles[1]
    picture = row(0, size)["images"][0]
    views = with_tiles([picture], tiles)
    assert views[0] is picture
    assert [view.size for view in views[1:]] == [(right - left, lower - upper) for left, upper, right, lower in boxes]


def test_what_is_no_grid_is_refused():
    assert parse_tiles("1x1") is None and parse_tiles("3x2") == (3, 2)
    for text in ("2", "0x2", "2x", "9x9", "2×2", "x"):
        with pytest.raises(ValueError, match="COLUMNSxROWS of at most 16"):
            parse_tiles(text)


def test_a_batch_shows_the_picture_and_then_its_tiles(tiny_llava, tiled):
    config = load_config(str(tiny_llava))
    plain = load_processing_class(str(tiny_llava))
    later = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "<image>\nAnd here?"},
            row(1)["messages"][1],
        ],
        "images": row(1)["images"],
        "row": 1,
    }
    batch, one_view = LlavaDataCollator(tiled, None, config)([row(0), later]), LlavaDataCollator(plain)([row(0), later])
    assert batch["pixel_values"].shape[0] == 5 * one_view["pixel_values"].shape[0] == 10
    assert torch.equal(batch["pixel_values"][[0, 5]], one_view["pixel_values"])
    tiles = [{"messages": row(0)["messages"], "images": [view]} for view in with_tiles(row(0)["images"], (2, 2))[1:]]
    assert torch.equal(batch["pixel_values"][1:5], LlavaDataCollator(plain)(tiles)["pixel_values"])
    image = batch["input_ids"] == config.image_token_id
    assert image.sum(1).tolist() == [5 * int((one_view["input_ids"][0] == config.image_token_id).sum())] * 2
    for number, labels in enumerate(batch["labels"]):
        words = one_view["labels"][number]
        assert labels[labels != -100].tolist() == words[words != -100].tolist()
    asked = row(0) | {"messages": row(0)["messages"][:1]}
    prompt = prompt_batch(tiled, [asked])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0][: len(prompt)], prompt)


def test_the_audit_the_plan_and_shared_prefixes_count_tiles(tiny_llava, tiled, cctv_dataset):
    rows = open_dataset(str(cctv_dataset), vision=True)["train"].select(range(6))
    collate, config = LlavaDataCollator(tiled), load_config(str(tiny_llava))
    lengths = [int(collate([one])["attention_mask"].sum()) for one in rows]
    audits = Auditor(tiled, config)(list(rows))
    assert [audit.faults for audit in audits] == [[]] * 6
    assert [audit.num_tokens for audit in audits] == lengths
    assert {audit.num_images for audit in audits} == {5}
    template = (tiny_llava / "chat_template.jinja").read_text(encoding="utf-8")
    shape = ModelShape.from_config(config.to_dict())
    cost = picture_cost({"image_tiles": "2x2", "image_max_tiles": None}, config.to_dict(), shape)
    counter = RowCounter(tiny_llava, template, cost)
    counted = lengths_of(read_split(str(cctv_dataset), "train").slice(0, 6), counter, shares_prefix=False).counted
    assert [sequence.tokens for sequence in counted] == lengths
    assert {sequence.pictures for sequence in counted} == {5}
    grouped = row(3) | {"other_messages": [row(3)["messages"]]}
    shared = SharedPrefixCollator(tiled)([grouped])
    alone = collate([row(3)])["input_ids"][0]
    assert shared["prefix_length"] == int((alone == config.image_token_id).nonzero()[-1]) + 1
    assert torch.equal(shared["input_ids"][0][: len(alone) - 1], alone[:-1])


def test_a_saved_processor_shows_the_same_tiles(tiled, tmp_path):
    tiled.save_pretrained(tmp_path)
    again = load_saved_processing_class(tmp_path)
    assert tiles_of(again) == (2, 2)
    assert torch.equal(
        LlavaDataCollator(again)([row(2)])["pixel_values"], LlavaDataCollator(tiled)([row(2)])["pixel_values"]
    )


def test_models_with_tiles_of_their_own_are_refused(tiny_gemma):
    with pytest.raises(ValueError, match="image_tiles: 2x2, but gemma reads text only"):
        load_processing_class(str(tiny_gemma), image_tiles="2x2")


@pytest.mark.slow
def test_counts_are_read_from_all_views(tiny_llava, tiled):
    """Questions about one picture share its views; the packed prompts give what transformers gives."""
    model, _ = load_for_inference(str(tiny_llava), dtype=torch.float32)
    asked = [one | {"messages": one["messages"][:1], "image_id": one["row"]} for one in (row(0), row(1), row(1))]
    reader = CountReader(model, tiled, {"How many people are in view?": AnswerForm("", " people.")}, 30)
    packed = torch.tensor(read_counts(reader, asked, batch_size=2))
    plain = torch.tensor(read_by_transformers(reader, asked, batch_size=1, description=""))
    assert torch.allclose(packed, plain, atol=1e-4)
    groups = PromptReader(tiled, asked).read([1, 2])
    assert [(group.rows, len(group.pictures["pixel_values"])) for group in groups] == [([1, 2], 5)]
