"""Paste people of a fixed camera's own frames into other moments of its scene: crowds whose number is known.

    python benchmarks/paste_people.py --frames frames --first 720 --size 448x448 --output data/raw-crowds --number 8000
    python benchmarks/paste_people.py --frames frames --first 720 --size 448x448 --labels labels.csv \\
        --output data/raw-mall --number 6000

The camera does not move, so whatever differs from the median of the training frames stands before the scene. Differences
as tall and as narrow as one person at that place are cut out, and pasted near where they stood, alone or in groups: size,
light and what hides them are right by themselves. A person counts whose head is still seen, as it does for annotators.

Without --labels they go over the empty scene, and labels.csv holds the heads of the frame, of its nine parts, and of each cell
of a grid of seven by seven, as digits (9 stands for more, too). They are the turns of one dialogue, the whole frame first, so
that a frame is one row: where people stand teaches a small model to look sooner than one large number does.

With --labels the training frames themselves are changed: people who stand alone are pasted in or painted over, and the
label follows; three in ten stay as they were. The frames after --first and --gap follow unchanged, to validate and to
test on: `--split ordered --train NUMBER` of prepare_cctv.py. With --subtract every frame written is the difference from the
empty scene, grey where nothing stands.
"""

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from finetuning import command

DIFFERENT = 32  # of 255: more than light and noise do
ROWS = {"top": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "bottom": (2 / 3, 1)}
COLUMNS = {"left": (0, 1 / 3), "center": (1 / 3, 2 / 3), "right": (2 / 3, 1)}
GRID = 7  # rows, and cells of a row
KOREAN = {"top": "위", "middle": "가운데", "bottom": "아래", "left": "왼쪽", "center": "중앙", "right": "오른쪽"}
# Feet's and body's height as shares of the frame's, read off the mall camera by eye.
FEET, TALL = (0.10, 0.15, 0.25, 0.40, 0.62, 0.80, 1.00, 1.30), (0.05, 0.065, 0.13, 0.16, 0.22, 0.24, 0.27, 0.31)
MESSAGES = "USER: How many people are in view?\nASSISTANT: {count} people.\n\n사용자: 사람이 몇 명 있나요?\n어시스턴트: {count}명입니다.\n"


def parts() -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Name of a column of labels.csv -> (from, to) of x and of y, as shares of the frame."""
    nine = {f"{row}_{column}": (x, y) for row, y in ROWS.items() for column, x in COLUMNS.items()}
    return {"count": ((0, 1), (0, 1))} | nine


def grid(heads: list[tuple[float, float]]) -> str:
    """How many heads are in each cell of a row, 9 at most, and a letter before each row: "a0010200 b0000310 ..."."""
    cells = np.zeros((GRID, GRID), int)
    for x, y in heads:
        cells[int(y * GRID), int(x * GRID)] += 1
    rows = ("".join(map(str, row)) for row in cells.clip(max=9).tolist())
    return " ".join(f"{letter}{row}" for letter, row in zip("abcdefg", rows, strict=True))


def messages() -> str:
    """The text of messages.txt: the count of the frame, then those of its nine parts, or its grid."""
    english = ["USER: How many people are in view?", "ASSISTANT: {count} people."]
    korean = ["사용자: 사람이 몇 명 있나요?", "어시스턴트: {count}명입니다."]
    dialogues = [
        [*english, "USER: Count each cell of the grid.", "ASSISTANT: {grid}"],
        [*korean, "사용자: 칸마다 세어 주세요.", "어시스턴트: {grid}"],
    ]
    for name in list(parts())[1:]:
        english += [f"USER: How many people are in the {name.replace('_', ' ')}?", f"ASSISTANT: {{{name}}}."]
        place = " ".join(KOREAN[word] for word in name.split("_"))
        korean += [f"사용자: {place}에는 몇 명 있나요?", f"어시스턴트: {{{name}}}명."]
    return "\n\n".join("\n".join(turns) for turns in (*dialogues, english, korean)) + "\n"


@dataclass
class Cutout:
    """One person: colours and soft edge of a rectangle of a frame, and whether nobody else touches it."""

    frame: int
    top: int
    left: int
    pixels: np.ndarray  # (height, width, 3) uint8
    alpha: np.ndarray  # (height, width) float32, 0 to 1

    @property
    def feet(self) -> int:
        """Row that they stand on."""
        return self.top + len(self.alpha)


@dataclass
class Camera:
    """What every process draws from, sent to each once."""

    scene: np.ndarray  # (height, width, 3) uint8
    cutouts: list[Cutout]
    paths: list[Path]
    paths_after: list[Path]
    counts: list[int]  # of the training frames; empty where crowds are made over the empty scene
    counts_after: list[int]  # of the frames after them
    most: int
    folder: Path
    subtracts: bool


camera: Camera


def take(given: Camera) -> None:
    """Give this process of the pool its camera."""
    global camera
    camera = given


def size_of(text: str) -> tuple[int, int]:
    """ "448x448" -> (448, 448)."""
    width, times, height = text.partition("x")
    if not (times and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--size {text}: expected WIDTHxHEIGHT in pixels, such as 448x448")
    return int(width), int(height)


def read(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A frame as (height, width, 3) bytes, resized to (width, height) = `size`."""
    with Image.open(path) as frame:
        return np.asarray(frame.convert("RGB").resize(size))


def cut_out(job: tuple[int, Path], scene: np.ndarray) -> list[Cutout]:
    """The people of one frame who stand alone: differences of a person's height and width at that place."""
    number, path = job
    height, width = scene.shape[:2]
    frame = read(path, (width, height))
    with Image.open(path) as original:
        stretched = width * original.height / (height * original.width)
    light = float(np.median(frame.astype(float) - scene))
    mask = np.abs(frame - light - scene).max(-1) > DIFFERENT
    mask = ndimage.binary_opening(ndimage.binary_closing(mask, iterations=2), iterations=1)
    labels, _ = ndimage.label(mask)
    cutouts = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = box
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        expected = np.interp(rows.stop / height, FEET, TALL) * height
        if not (0.75 < tall / expected < 1.25 and 0.22 < wide / stretched / tall < 0.55):
            continue
        if rows.start == 0 or columns.start == 0 or columns.stop == width:
            continue
        inside = ndimage.binary_fill_holes(labels[box] == index)
        if inside.mean() < 0.4:
            continue
        top, left = max(0, rows.start - 2), max(0, columns.start - 2)
        alpha = np.zeros((min(height, rows.stop + 2) - top, min(width, columns.stop + 2) - left), np.float32)
        alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = inside
        alpha = np.asarray(Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8)))
        pixels = frame[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        cutouts.append(Cutout(number, top, left, pixels.copy(), alpha.astype(np.float32) / 255))
    return cutouts


def blend(picture: np.ndarray, top: int, left: int, pixels: np.ndarray, alpha: np.ndarray) -> None:
    """Lay pixels over (height, width, 3) float32, in place; what is outside is cut off."""
    height, width = picture.shape[:2]
    up, down = max(0, -top), min(alpha.shape[0], height - top)
    begin, end = max(0, -left), min(alpha.shape[1], width - left)
    if up >= down or begin >= end:
        return
    part = picture[top + up : top + down, left + begin : left + end]
    share = alpha[up:down, begin:end, None]
    part += share * (pixels[up:down, begin:end] - part)


def place(number: int, rng: np.random.Generator) -> list[Cutout]:
    """Draw `number` people and where they stand: near where they were seen, two in five beside another one."""
    chosen: list[Cutout] = []
    feet = np.array([person.feet for person in camera.cutouts])
    for _ in range(number):
        beside = chosen[rng.integers(len(chosen))] if chosen and rng.random() < 0.4 else None
        if beside is None:
            person = camera.cutouts[rng.integers(len(camera.cutouts))]
            left = person.left + round(rng.normal(0, 0.35 * person.alpha.shape[1]))
        else:
            # People who stand as far from the camera are as large.
            near = np.flatnonzero(np.abs(feet - beside.feet) <= 0.03 * camera.scene.shape[0])
            person = camera.cutouts[rng.choice(near)]
            left = beside.left + round(rng.choice([-1, 1]) * rng.uniform(0.5, 1.3) * beside.alpha.shape[1])
        chosen.append(replace(person, left=left))
    return chosen


def paste(picture: np.ndarray, chosen: list[Cutout], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Paste people, those behind first; where the heads are that are still seen, as shares of the frame."""
    height, width = picture.shape[:2]
    owner = np.full((height, width, 1), -1.0, np.float32)
    heads = []
    for number, person in enumerate(sorted(chosen, key=lambda one: one.feet)):
        pixels, alpha = person.pixels, person.alpha
        if rng.random() < 0.5:
            pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
        pixels = pixels * rng.normal(1, 0.06) + rng.normal(0, 4, 3)
        blend(picture, person.top, person.left, pixels.astype(np.float32), alpha)
        solid = (alpha > 0.5).astype(np.float32)
        blend(owner, person.top, person.left, np.full((*alpha.shape, 1), number, np.float32), solid)
        heads.append((person.top, person.left, solid[: max(2, len(solid) // 7)]))
    seen = []
    for number, (top, left, head) in enumerate(heads):
        tall, wide = head.shape
        theirs = owner[max(0, top) : top + tall, max(0, left) : max(0, left + wide), 0] == number
        if theirs.sum() >= 0.4 * head.sum():
            seen.append(((left + wide / 2) / width, (top + tall / 2) / height))
    return seen


def write(picture: np.ndarray, number: int) -> None:
    """Write (height, width, 3) of 0 to 255 as a JPEG; half the difference from the empty scene and 128 if it is subtracted."""
    if camera.subtracts:
        light = np.float32(np.median(picture[::4, ::4] - camera.scene[::4, ::4]))
        picture = (picture - light - camera.scene) / 2 + 128
    image = Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))
    image.save(camera.folder / "frames" / f"{number:06}.jpg", quality=92)


def another_moment(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, focus and noise of another moment."""
    if rng.random() < 0.3:
        picture = ndimage.gaussian_filter(picture, (sigma := rng.uniform(0.3, 0.7), sigma, 0))
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 3))
    return picture * np.float32(rng.normal(1, 0.04)) + np.float32(rng.normal(0, 3)) + noise


def crowd(number: int) -> dict[str, int | str]:
    """Write a frame of people over the empty scene; its labels."""
    rng = np.random.default_rng(number)
    picture = camera.scene.astype(np.float32)
    heads = paste(picture, place(int(rng.integers(0, camera.most + 1)), rng), rng)
    write(another_moment(picture, rng), number)
    inside = [(min(max(x, 0), 0.999), min(max(y, 0), 0.999)) for x, y in heads]
    counts = {
        name: sum(low <= x < high and up <= y < down for x, y in inside)
        for name, ((low, high), (up, down)) in parts().items()
    }
    return counts | {"grid": grid(inside)}


def change(number: int) -> dict[str, int]:
    """Write a training frame with some who stand alone painted over and others pasted in; its count."""
    rng = np.random.default_rng([number, 1])
    frame = int(rng.integers(len(camera.counts)))
    height, width = camera.scene.shape[:2]
    picture = read(camera.paths[frame], (width, height)).astype(np.float32)
    count = camera.counts[frame]
    if rng.random() < 0.7:
        light = np.float32(np.median(picture - camera.scene))
        share = rng.choice([0.0, 0.3, 0.8])
        for person in camera.cutouts:
            if person.frame == frame and rng.random() < share:
                paint_over(picture, person, light)
                count -= 1
        # Whoever is pasted in must not hide the heads of those who are there.
        taken = np.abs(picture - light - camera.scene).max(-1) > DIFFERENT
        free = [person for person in place(int(rng.integers(0, 20)), rng) if stands_free(person, taken)]
        count += len(paste(picture, free, rng))
    write(another_moment(picture, rng), number)
    return {"count": max(0, count)}


def paint_over(picture: np.ndarray, person: Cutout, light: np.float32) -> None:
    """Lay the empty scene over a person, in place."""
    tall, wide = person.alpha.shape
    grown = np.pad(person.alpha > 0, 3)
    soft = ndimage.gaussian_filter(ndimage.binary_dilation(grown, iterations=2).astype(np.float32), 1)
    empty = np.pad(camera.scene, ((3, 3), (3, 3), (0, 0)), mode="edge").astype(np.float32) + light
    there = empty[person.top : person.top + tall + 6, person.left : person.left + wide + 6]
    blend(picture, person.top - 3, person.left - 3, there, soft)


def stands_free(person: Cutout, taken: np.ndarray) -> bool:
    """Whether at most a fifth of where a person would stand is taken, of a (height, width) mask."""
    top, left = max(0, person.top), max(0, person.left)
    there = taken[top : person.feet, left : max(0, person.left + person.alpha.shape[1])]
    return there.size > 0 and there.mean() <= 0.2


def leave(number_and_frame: tuple[int, int]) -> dict[str, int]:
    """Write a frame unchanged; its count."""
    number, frame = number_and_frame
    height, width = camera.scene.shape[:2]
    write(read(camera.paths_after[frame], (width, height)).astype(np.float32), number)
    return {"count": camera.counts_after[frame]}


def write_all(shared: Camera, number: int) -> None:
    """Write all frames, and labels.csv beside them."""
    after = range(len(shared.counts_after))
    with (
        Pool(initializer=take, initargs=(shared,)) as pool,
        (shared.folder / "labels.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.DictWriter(file, ["id", *(["count"] if shared.counts else [*parts(), "grid"])])
        table.writeheader()
        made = pool.imap(change if shared.counts else crowd, range(1, number + 1), 20)
        left = pool.imap(leave, zip(range(number + 1, number + 1 + len(after)), after, strict=True), 20)
        everything = tqdm(chain(made, left), "pasting", number + len(after), unit="frame")
        for row, labels in enumerate(everything, 1):
            table.writerow({"id": row, **labels})
    (shared.folder / "messages.txt").write_text(MESSAGES if shared.counts else messages(), encoding="utf-8")


def main() -> None:
    """Cut people out of the frames, paste them, and write pictures and labels to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="folder of the camera's frames, in order by name")
    parser.add_argument("--first", type=int, required=True, help="how many of them belong to the training split")
    parser.add_argument("--gap", type=int, default=0, help="frames behind them to leave out (default %(default)s)")
    parser.add_argument("--labels", type=Path, help="CSV with a row per frame, in order, and a column `count`")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--number", type=int, default=8000, help="frames to write (default %(default)s)")
    parser.add_argument(
        "--most", type=int, default=60, help="people over the empty scene at most (default %(default)s)"
    )
    parser.add_argument("--size", help="WIDTHxHEIGHT of the frames written, stretched; left out: as the frames are")
    parser.add_argument("--subtract", action="store_true", help="write differences from the empty scene")
    args = parser.parse_args()
    if args.output.exists():
        raise ValueError(f"{args.output} exists already: choose another --output")
    paths = sorted(args.frames.iterdir())
    if not 1 <= args.first <= len(paths):
        raise ValueError(f"--first {args.first}: expected 1 or more, and {args.frames} holds {len(paths)} of them")
    counts: list[int] = []
    if args.labels is not None:
        with args.labels.open(encoding="utf-8-sig", newline="") as file:
            counts = [int(row["count"]) for row in csv.DictReader(file)]
        if len(counts) != len(paths):
            raise ValueError(f"{args.labels}: expected a row for each of the {len(paths)} frames, found {len(counts)}")
    with Image.open(paths[0]) as first:
        size = first.size if args.size is None else size_of(args.size)
    first_paths = paths[: args.first]
    scene = np.median([read(path, size) for path in first_paths[:: max(1, args.first // 150)]], axis=0).astype(np.uint8)
    (args.output / "frames").mkdir(parents=True)
    with Pool() as pool:
        jobs = pool.imap(partial(cut_out, scene=scene), enumerate(first_paths), 10)
        cutouts = [person for found in tqdm(jobs, "cutting out", args.first, unit="frame") for person in found]
    if not cutouts:
        raise ValueError(f"{args.frames}: nothing in these frames is as tall and as narrow as a person standing alone")
    later = slice(args.first + args.gap, None)
    split = counts[: args.first], counts[later]
    shared = Camera(scene, cutouts, first_paths, paths[later], *split, args.most, args.output, args.subtract)
    write_all(shared, args.number)
    print(f"{args.output}: {args.number} frames of {len(cutouts):,} people cut out of {args.first}")


if __name__ == "__main__":
    command.run(main)
