"""Pictures changed at random show all that they showed, the same on every way to a row, and flips spare words of sides."""

from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import SeedableRandomSampler, skip_first_batches
from datasets import Dataset
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader

from finetuning.arguments import ScriptArguments
from finetuning.data.augmentation import KINDS, augment, augment_batches, names_sides
from finetuning.preflight.features import augmentation_problems
from finetuning.training.read_ahead import read_next_epoch_ahead


def picture_of_people(count: int, seed: int) -> Image.Image:
    """Bright squares apart from one another on a dark picture, the first in its corner."""
    places = np.random.default_rng(seed).permutation(np.arange(1, 48))[: count - 1]
    pixels = np.full((90, 120, 3), 40, np.uint8)
    for place in [0, *places]:
        row, column = divmod(int(place), 8)
        pixels[15 * row : 15 * row + 7, 15 * column : 15 * column + 6] = (230, 220, 210)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)])
def test_a_changed_picture_shows_as_many_people(kinds):
    """Also those who touch its edge, which a crop would lose."""
    changed = 0
    for seed in range(40):
        picture = picture_of_people(2 + seed % 20, seed)
        result = augment(picture, kinds, np.random.default_rng(seed))
        assert (result.size, result.mode) == (picture.size, "RGB")
        assert ndimage.label(np.asarray(result)[..., 0] > 110)[1] == 2 + seed % 20
        changed += result.tobytes() != picture.tobytes()
    assert changed >= 8


def rows_of_pictures(number: int) -> list[dict]:
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3."}]
    return [{"row": row, "messages": turns, "images": [picture_of_people(5, row)]} for row in range(number)]


def collate(examples: list[dict]) -> list[tuple[int, bytes]]:
    return [(example["row"], example["images"][0].tobytes()) for example in examples]


def loader(workers: int = 0) -> DataLoader:
    rows = rows_of_pictures(10)
    made = DataLoader(
        rows,
        batch_size=4,
        sampler=SeedableRandomSampler(rows, data_seed=3),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    augment_batches(made, KINDS, seed=7)
    return made


def epochs(batches: DataLoader) -> list[list]:
    return [[list(batch) for batch in batches.__iter__()] for _ in range(3)]


def by_row(epoch: list) -> list[bytes]:
    """The pictures of an epoch in the order of their rows."""
    return [pixels for _, pixels in sorted(item for batch in epoch for item in batch)]


def test_each_epoch_changes_a_row_anew_and_a_resumed_one_as_the_first_would_have():
    expected = epochs(loader())
    for pictures in zip(*map(by_row, expected), strict=True):
        assert len(set(pictures)) == 3
    resumed = loader()
    resumed.sampler.set_epoch(1)
    assert [list(batch) for batch in skip_first_batches(resumed, 1)] == expected[1][1:]
    assert [list(batch) for batch in resumed] == expected[2]


@pytest.mark.slow
def test_loader_processes_that_read_ahead_change_rows_as_one_process_does():
    ahead = loader(workers=2)
    assert read_next_epoch_ahead(ahead)
    assert epochs(ahead) == epochs(loader())


def test_an_order_that_tells_no_epoch_is_refused():
    with pytest.raises(ValueError, match="train_sampling_strategy: random"):
        augment_batches(DataLoader(rows_of_pictures(2), collate_fn=collate), ["flip"], seed=0)


@pytest.mark.parametrize(
    ("text", "speaks_of_sides"),
    [
        ("How many people are on the LEFT?", True),
        ("The rightmost person waves.", True),
        ("Turn counter-clockwise.", True),
        ("왼쪽에 몇 명 있나요?", True),
        ("오른편 문 앞에 두 명", True),
        ("좌측 상단입니다.", True),
        ("How many people are in view?", False),
        ("It is bright, copyrighted and upright.", False),
        ("물가가 오른 뒤 우편이 왔다.", False),
    ],
)
def test_words_of_sides_are_found_in_english_and_korean(text, speaks_of_sides):
    first = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    second = [{"role": "user", "content": text}, {"role": "assistant", "content": "2."}]
    rows = Dataset.from_dict({"messages": [first, second, second]})
    assert names_sides(rows) == ((1, text) if speaks_of_sides else None)
    assert names_sides(rows.select([0])) is None


def test_what_would_be_ignored_or_make_a_text_untrue_is_refused_with_the_row():
    turns = [{"role": "user", "content": "Who is on the left?"}, {"role": "assistant", "content": "A boy."}]
    rows = Dataset.from_dict({"messages": [turns], "images": [[None]]})
    asked, order = ScriptArguments("data", image_augmentation="flip"), SimpleNamespace(train_sampling_strategy="random")
    (problem,) = augmentation_problems(asked, order, rows)
    assert "row 0 untrue, which says 'Who is on the left?': leave flip out" in problem
    (problem,) = augmentation_problems(asked, order, rows.remove_columns("images"))
    assert "has no effect: the rows hold no pictures" in problem
    blurred = ScriptArguments("data", image_augmentation=["blur"])
    assert augmentation_problems(blurred, order, rows) == []
    (problem,) = augmentation_problems(blurred, SimpleNamespace(train_sampling_strategy="group_by_length"), rows)
    assert "set train_sampling_strategy: random" in problem
