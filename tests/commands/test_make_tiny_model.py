"""What a tiny LLaVA is pretrained on says what its pictures show."""

import random

import torch
from conftest import must_run
from make_tiny_model import describe_grid, shape_row
from safetensors.torch import load_file


def test_a_grid_says_in_which_cell_each_shape_is():
    assert describe_grid([(1, 1), (63, 1), (40, 20), (41, 20), (1, 63)], 64) == "1001 0020 0000 1000"
    assert describe_grid([(5, 5)] * 12, 64).startswith("9000 ")


def test_every_answer_of_a_row_is_the_count_of_its_picture():
    rng, located = random.Random(0), 0
    for _ in range(40):
        first, *others = [turn["content"] for turn in shape_row(rng, 64, 9)["messages"][1::2]]
        count = int("".join(filter(str.isdigit, first)))
        assert 1 <= count <= 9
        for grid in others:
            located += 1
            assert sum(map(int, grid.replace(" ", ""))) == count
    assert 8 < located < 32


def test_pretraining_moves_every_part(tmp_path):
    small = ("--hidden_size", "32", "--vision_hidden_size", "32", "--vision_layers", "2", "--image_size", "32")
    make = ("scripts/make_tiny_model.py", "--architecture", "llava", *small)
    must_run(*make, "--output", tmp_path / "drawn")
    must_run(*make, "--output", tmp_path / "base", "--pretrain", "--steps", "2", "--batch_size", "4")
    drawn, base = (load_file(tmp_path / name / "model.safetensors") for name in ("drawn", "base"))
    moved = {name.split(".")[0] for name, tensor in base.items() if not torch.equal(tensor, drawn[name])}
    assert moved == {name.split(".")[0] for name in base}
