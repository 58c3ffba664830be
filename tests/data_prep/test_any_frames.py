"""Any valid set of frames, labels and templates: each row is its frame, its label and a template, and nothing is lost."""

import csv
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import prepare_cctv
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.raw_data import draw, read_output

NUM_PICTURES = 12
NAME = st.text(st.sampled_from("abcXYZ가나다é ._-()0123456789"), min_size=1, max_size=12).filter(
    lambda name: name.strip() == name and name.strip("._- ()")
)
CELL = st.text(st.characters(categories=["L", "P", "Zs", "S"], exclude_characters="{}<[\"'"), max_size=12)
TEMPLATES = (
    "USER: How many people?\nASSISTANT: {count} people.\n",
    "사용자: 몇 명인가요?\n어시스턴트: {count}명입니다.\n사용자: 언제인가요?\n어시스턴트: {when}\n",
    "USER: Is it {when}?\nASSISTANT: I count {count}.\n",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [draw(folder / f"{number}.{'png' if number % 2 else 'jpg'}", number) for number in range(NUM_PICTURES)]


@st.composite
def recordings(choose):
    """(file name of each frame, how its label calls it or None for none, counts, a second column, strangers)."""
    number = choose(st.integers(4, NUM_PICTURES))
    suffixes = [(".png", ".PNG") if i % 2 else (".jpg", ".JPEG") for i in range(number)]
    suffixes = [choose(st.sampled_from(each)) for each in suffixes]
    labelled = [True, *choose(st.lists(st.booleans(), min_size=number - 2, max_size=number - 2)), True]
    if choose(st.booleans()):  # a series, labelled by number
        first, width = choose(st.integers(1, 5000)), choose(st.integers(4, 8))
        names = [f"seq_{first + i:0{width}}{suffix}" for i, suffix in enumerate(suffixes)]
        called = [str(first + i) for i in range(number)]
        strangers = [str(first + number + 1000)]
    else:  # names that people gave
        stems = choose(st.lists(NAME, min_size=number, max_size=number, unique_by=lambda n: clean(n).casefold()))
        stems = [f"{stem} cam{chr(97 + i)}" for i, stem in enumerate(stems)]
        names = [stem + suffix for stem, suffix in zip(stems, suffixes, strict=True)]
        called = names if choose(st.booleans()) else [f"frames/{name}" for name in names]
        strangers = ["nobody knows it.jpg" if called is names else "frames/nobody knows it.jpg"]
    counts = choose(st.lists(st.integers(0, 3000), min_size=number, max_size=number))
    cells = choose(st.lists(CELL, min_size=number, max_size=number))
    cells[0] = cells[0].strip() or "noon"  # an empty cell that a template uses is a label's end; one is left
    called = [name if keep else None for name, keep in zip(called, labelled, strict=True)]
    return names, called, counts, cells, strangers if choose(st.booleans()) else []


def clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def turns_of(template: str, values: dict[str, str]) -> list[tuple[str, str]]:
    """What a template says, filled in: (role, text) of each turn."""
    roles = {"USER": "user", "사용자": "user", "ASSISTANT": "assistant", "어시스턴트": "assistant"}
    lines = [line.partition(": ") for line in template.splitlines()]
    return [(roles[role], clean(text.format(**values))) for role, _, text in lines]


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False, "phases": [Phase.generate]}


@settings(max_examples=15, derandomize=True, **COMMON)
@given(
    recordings(),
    st.permutations(TEMPLATES),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["count", "Count", "people"]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
@pytest.mark.slow
def test_each_row_is_its_frame_its_label_and_a_template(pictures, recording, templates, separator, column, encoding):
    names, called, counts, cells, strangers = recording
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        folder = Path(folder)
        (folder / "frames").mkdir()
        for name, picture in zip(names, pictures, strict=False):
            shutil.copyfile(picture, folder / "frames" / name)
        with (folder / "labels.csv").open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(["frame", column, "when"])
            writer.writerows(row for row in zip(called, counts, cells, strict=True) if row[0] is not None)
            writer.writerows([stranger, 7, "x"] for stranger in strangers)
        (folder / "messages.txt").write_text("\n".join(templates), encoding="utf-8")
        words = ["--frames", folder / "frames", "--labels", folder / "labels.csv", "--output", folder / "out"]
        words += ["--messages", folder / "messages.txt", "--split", "random", "--questions_per_frame", "all"]
        words += ["--validation_size", "0", "--test_size", "0"]
        patch.setattr(sys, "argv", ["prepare_cctv.py", *map(str, words)])
        prepare_cctv.main()
        dataset, manifest, rejects = read_output(folder / "out")  # accepted and rejected are what was read
    of_name = {clean(name): place for place, name in enumerate(names)}
    found = []
    for rows in dataset.values():
        for row in rows.with_format("arrow")[:].to_pylist():
            place = of_name[clean(Path(row["image_id"]).name)]
            assert row["images"][0]["bytes"] == pictures[place].read_bytes()
            assert row["count"] == counts[place]
            turns = [(message["role"], message["content"]) for message in row["messages"]]
            values = {"count": str(counts[place]), "when": clean(cells[place])}
            ours = [i for i, each in enumerate(templates) if turns_of(each, values) == turns]
            assert len(ours) == 1, (turns, values)
            found.append((place, ours[0]))
    known = [place for place, name in enumerate(called) if name is not None]
    usable = [(place, i) for place in known if cells[place].strip() for i in range(len(templates))]
    assert sorted(found) == sorted(usable)
    assert manifest["read"]["frames"]["read"] == len(names)
    assert manifest["read"]["labels"]["read"] == len(known) + len(strangers)
    assert len([reject for reject in rejects if reject[2] == "no_label"]) <= len(names) - len(known)
