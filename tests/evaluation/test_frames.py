"""Frames of a video are drawn in blocks of time, near-copies count as one: an interval is not narrower than it should be."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.signal import lfilter

from finetuning.evaluation.bootstrap import block_interval, block_length, compare
from finetuning.evaluation.frames import frame_times, near_copies, thumbnail


def autocorrelated(rng, number, correlation):
    """Errors of a model on a video: each frame's is `correlation` times the one before, and noise."""
    return lfilter([1], [1, -correlation], rng.normal(size=number + 300))[300:]


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_the_interval_holds_the_truth_as_often_as_it_says(correlation):
    """500 videos of 400 frames; 95 of 100 intervals should hold the mean, 0. Frames taken as independent: 31 at 0.9."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(500):
        low, high, _, _ = block_interval(autocorrelated(rng, 400, correlation), np.ones(400))
        held += low <= 0 <= high
    assert 0.92 <= held / 500 <= 0.97


def test_scenes_that_stand_still_do_not_make_it_narrow():
    """Each scene is 20 near-equal frames."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(500):
        scenes = np.repeat(rng.normal(size=21), 20)[rng.integers(20) :][:400]
        low, high, _, _ = block_interval(scenes + rng.normal(0, 0.1, 400), np.ones(400))
        held += low <= 0 <= high
    assert 0.92 <= held / 500 <= 0.97


def test_white_noise_needs_no_blocks_and_a_slow_series_long_ones():
    rng = np.random.default_rng(5)
    lengths = [block_length(rng.normal(size=400)) for _ in range(50)]
    assert np.median(lengths) == 1
    assert block_length(autocorrelated(rng, 400, 0.9)) > 10


def test_frames_in_time_say_so_and_how_many_independent_ones_tell_as_much():
    rng = np.random.default_rng(6)
    names = [f"seq_{number:06d}.jpg" for number in range(801, 1001)]
    shuffled = rng.permutation(200)
    change = autocorrelated(rng, 200, 0.9)
    difference = compare(
        "MAE",
        np.zeros(200),
        change[shuffled],
        [names[i] for i in shuffled],
        lower_is_better=True,
        times=frame_times(names),
    )
    assert difference.block > 10 and difference.num_independent < 60
    independent = compare("MAE", np.zeros(200), change, names, lower_is_better=True)
    assert difference.high - difference.low > 2 * (independent.high - independent.low)
    assert difference.low == pytest.approx(block_interval(change, np.ones(200))[0])  # whatever the order of the rows


@pytest.mark.parametrize(
    ("names", "are_frames"),
    [
        ([f"seq_{number:06d}.jpg" for number in range(60)], True),
        ([f"day{day}/cam2_{number:04d}.png" for day in (1, 2) for number in range(0, 900, 30)], True),
        ([f"COCO_val2014_{number:012d}.jpg" for number in np.random.default_rng(0).integers(1, 580_000, 60)], False),
        (["a.jpg", "b.jpg", "cat.png"], False),
        (["text-1"], False),
    ],
)
def test_frames_are_told_by_their_names(names, are_frames):
    assert (frame_times(names) is not None) == are_frames


def test_near_copies_are_one_picture_and_neighbours_of_a_busy_video_are_not():
    rng = np.random.default_rng(7)
    scene = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (320, 240), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(scene).astype(float)
    copies = [
        Image.fromarray(np.clip(noisy + rng.normal(0, 12, noisy.shape), 0, 255).astype(np.uint8)) for _ in range(3)
    ]
    buffer = io.BytesIO()
    scene.save(buffer, "JPEG", quality=40)
    moved = scene.copy()
    moved.paste((20, 20, 200), (200, 60, 270, 220))  # somebody walks in
    others = [moved, scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", (64, 64), (90, 90, 90))]
    pictures = [scene, *copies, Image.open(buffer), scene.filter(ImageFilter.GaussianBlur(1)), *others]
    assert near_copies([thumbnail(picture) for picture in pictures]) == [0, 0, 0, 0, 0, 0, 6, 7, 8]
    assert near_copies([]) == []
