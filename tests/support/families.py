"""A tiny model of each family's real classes, rows of every shape for it, and a task that it learns in a minute."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import must_run
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from transformers import CLIPVisionConfig

# With pictures, beside LLaVA-1.5, which all other tests are about.
FAMILIES = ("vipllava", "llava_next", "llava_onevision", "gemma3")
# The tower of the published LLaVAs.
CLIP_L_336 = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768,
)  # fmt: skip
SIZES = [(64, 48), (48, 64), (31, 30), (90, 20), (12, 80), (64, 64), (1, 1), (33, 77)]  # width, height


def make(family: str, folder: Path) -> Path:
    """A tiny model of a family, of few image tokens, in `folder`."""
    must_run(
        *("scripts/make_tiny_model.py", "--architecture", family, "--output", folder, "--hidden_size", "64"),
        *("--image_size", "32", "--patch_size", "8", "--vision_hidden_size", "32", "--vision_layers", "3"),
    )
    return folder


def picture(seed: int, size: tuple[int, int]) -> Picture.Image:
    """Noise, brighter on the left where `seed` is even."""
    noise = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    half = slice(None, -(-size[0] // 2)) if seed % 2 == 0 else slice(size[0] // 2, None)
    noise[:, half] += 120
    return Picture.fromarray(noise)


def dialogue(seed: int, *others: str) -> list[dict[str, str]]:
    """A question about `picture(seed)`, and others about anything."""
    messages = [
        {"role": "user", "content": "Is the left half brighter?"},
        {"role": "assistant", "content": "No." if seed % 2 else "Yes."},
    ]
    for question in others:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "There are 7."}]
    return messages


def rows_of_all_shapes() -> list[dict]:
    """A picture of each size, several pictures in a row, later turns, none; `image_id` where two rows share a picture."""
    rows = [
        {"messages": dialogue(number), "images": [picture(number, size)], "image_id": f"{number}"}
        for number, size in enumerate(SIZES)
    ]
    rows.append(rows[0] | {"messages": dialogue(0, "How many people?", "몇 명?")})
    rows.append(rows[3] | {"messages": [{"role": "system", "content": "Be brief."}, *dialogue(3)]})
    rows.append({"messages": dialogue(1), "images": [picture(1, SIZES[1]), picture(2, SIZES[3])], "image_id": "two"})
    rows.append({"messages": dialogue(1), "images": [], "image_id": "none"})
    return rows


def dataset_of(rows: list[dict], validation: list[dict], folder: Path) -> Path:
    """Prepared data as data_prep writes it, in `folder`."""
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(message), "images": List(Image()), "image_id": Value("string")})
    splits = {"train": rows, "validation": validation}
    DatasetDict({name: Dataset.from_list(of, features=features) for name, of in splits.items()}).save_to_disk(folder)
    return folder


def which_half(folder: Path) -> Path:
    """240 rows to learn from and 40 to be asked about: which half of a picture is brighter."""
    rows = [
        {"messages": dialogue(seed), "images": [picture(seed, SIZES[seed % 4])], "image_id": str(seed)}
        for seed in range(280)
    ]
    return dataset_of(rows[:240], rows[240:], folder)


def in_two_processes(train: Callable[[], None]) -> None:
    """`train()` in two processes that are forked from this one, so that nothing is imported again; DDP over gloo."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}

    def run(rank: int) -> None:
        os.environ |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train()
        assert PartialState().num_processes == 2

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
