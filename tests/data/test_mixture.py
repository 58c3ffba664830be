"""Rows of several sets train as one: as many as their weights say, the same after a restart, each named by its number."""

import json

import pytest
from datasets import load_from_disk

from finetuning.arguments import ScriptArguments
from finetuning.data.dataset import open_dataset, open_split
from finetuning.data.mixture import mix, open_mixed_in
from finetuning.preflight.strategies import rows_without_image
from support.families import dataset_of, dialogue, picture
from support.training import assert_equal_adapters, interrupted, train


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two prepared folders: 8 rows, and 10 of which every second has no picture."""
    folder = tmp_path_factory.mktemp("sets")
    for name, size in (("own", 8), ("general", 10)):
        rows = [
            {
                "messages": dialogue(seed, f"Of {name}?"),
                "images": [] if name == "general" and seed % 2 else [picture(seed, (40, 30))],
                "image_id": str(seed // 2),
            }
            for seed in range(size)
        ]
        dataset_of(rows, rows[:2], folder / name)
    return folder / "own", folder / "general"


def mixed(sets, weight, seed=1):
    own, general = map(str, sets)
    script_args = ScriptArguments(dataset_name=own, dataset_mixer={general: weight})
    rows = open_split(open_dataset(own, vision=True), "train", own)
    return mix(rows, open_mixed_in(script_args, vision=True, seed=seed), script_args), general


@pytest.mark.parametrize(("weight", "number"), [(0.3, 3), (1, 10), (2.5, 25)])
def test_each_set_gives_as_many_rows_as_its_weight_says(weight, number, sets, capsys):
    rows, general = mixed(sets, weight)
    assert rows["row"] == list(range(8 + number))
    assert f"rows 0 to 7: {sets[0]}\n  rows 8 to {7 + number}: {general}" in capsys.readouterr().out
    texts = [messages[2]["content"] for messages in rows["messages"]]
    assert texts == ["Of own?"] * 8 + ["Of general?"] * number
    # A picture of one set is none of another's, though both are called 0.
    assert {image_id.rpartition(" ")[0] for image_id in rows["image_id"][8:]} == {general}
    counts = {text: 0 for text in range(10)}
    for row in rows["images"][8:]:
        counts[len(row)] += 1
    assert rows_without_image(rows) == counts[0]
    again, _ = mixed(sets, weight)
    other, _ = mixed(sets, weight, seed=2)
    assert again["image_id"] == rows["image_id"]
    assert weight != 2.5 or other["image_id"] != rows["image_id"]


def test_sets_that_cannot_be_mixed_are_refused(sets, tmp_path):
    for given, message in (
        ("data/x", "is not JSON"),
        ("3", "expected names and weights"),
        ({"data/x": 0, "own": 1}, "the weight of data/x is 0, expected a number above 0; own is dataset_name itself"),
    ):
        with pytest.raises(ValueError, match=message):
            ScriptArguments(dataset_name="own", dataset_mixer=given)
    own, general = map(str, sets)
    weighted = load_from_disk(general)
    weighted = weighted.map(lambda row: {"messages": [message | {"weight": 1} for message in row["messages"]]})
    weighted.save_to_disk(tmp_path / "weighted")
    with pytest.raises(ValueError, match=r"messages of .*weighted are .*: prepare both with the same command"):
        mixed((own, tmp_path / "weighted"), 1)


@pytest.mark.slow
def test_a_mixed_run_resumes_to_the_same_bits(sets, tiny_llava, tmp_path):
    own, general = sets
    flags = ("--dataset_mixer", json.dumps({str(general): 0.5}), "--save_strategy", "steps", "--save_steps", "2")
    flags += ("--eval_answers", "0", "--vision_tower", "frozen")
    run = train(tiny_llava, own, tmp_path / "run", *flags)
    again = train(tiny_llava, own, interrupted(run, tmp_path / "again"), *flags)
    assert_equal_adapters(again, run)
