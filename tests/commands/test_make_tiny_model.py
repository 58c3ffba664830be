"""What a tiny LLaVA is pretrained on says what its pictures show."""

import random

from make_tiny_model import describe_grid, shape_row


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
