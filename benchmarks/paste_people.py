"""Paste people of a fixed camera's own frames into other moments of its scene: crowds whose number is known.

    python benchmarks/paste_people.py --frames frames --first 800 --output data/raw-pasted --number 8000
    python benchmarks/paste_people.py --frames frames --first 800 --labels labels.csv --output data/raw-changed --number 3200

The camera does not move, so whatever differs from the median of the training frames stands before the scene. Differences
as tall and as narrow as one person at that place are cut out, and pasted near where they stood: size, light and what
hides them are right by themselves. Without --labels they go over the empty scene, and labels.csv holds the heads of the
frame and of its parts (as draw_crowds.py does). With --labels the training frames themselves are changed: people who
stand alone are pasted in or painted over, and the label follows.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from draw_crowds import FEET, TALL, messages, parts
from PIL import Image, ImageFilter
from scipy import ndimage
from tqdm import tqdm

DIFFERENT = 32  # of 255: more than light and noise do
MESSAGES = "USER: How many people are in view?\nASSISTANT: {count} people.\n\n사용자: 사람이 몇 명 있나요?\n어시스턴트: {count}명입니다.\n"


@dataclass
class Cutout:
    """One person: colours and soft edge of a rectangle of a frame, and whether nobody else touches it."""

    frame: int
    top: int
    left: int
    pixels: np.ndarray  # (height, width, 3) uint8
    alpha: np.ndarray  # (height, width) float32, 0 to 1


@dataclass
class Camera:
    """What every process draws from, sent to each once."""

    scene: np.ndarray  # (height, width, 3) uint8
    cutouts: list[Cutout]
    paths: list[Path]
    counts: list[int]
    most: int
    folder: Path


camera: Camera


def take(given: Camera) -> None:
    """Give this process of the pool its camera."""
    global camera
    camera = given


def read(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A frame as (height, width, 3) bytes, resized to (width, height) = `size`."""
    with Image.open(path) as frame:
        return np.asarray(frame.convert("RGB").resize(size))


def cut_out(job: tuple[int, Path], scene: np.ndarray) -> list[Cutout]:
    """The people of one frame who stand alone: differences of a person's height and width at that place."""
    number, path = job
    height, width = scene.shape[:2]
    frame = read(path, (width, height))
    light = float(np.median(frame.astype(float) - scene))
    mask = np.abs(frame - light - scene).max(-1) > DIFFERENT
    mask = ndimage.binary_opening(ndimage.binary_closing(mask, iterations=2), iterations=1)
    labels, _ = ndimage.label(mask)
    cutouts = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = box
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        expected = np.interp(rows.stop / height, FEET, TALL) * height
        if not (0.75 < tall / expected < 1.25 and 0.22 < wide / tall < 0.55):
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


def paste(picture: np.ndarray, chosen: list[Cutout], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Paste people, those behind first; where their heads are, as shares of the frame."""
    height, width = picture.shape[:2]
    heads = []
    for person in sorted(chosen, key=lambda one: one.top + len(one.alpha)):
        tall, wide = person.alpha.shape
        pixels, alpha = person.pixels, person.alpha
        if rng.random() < 0.5:
            pixels, alpha = pixels[:, ::-1], alpha[:, ::-1]
        left = person.left + round(rng.normal(0, 0.35 * wide))
        pixels = pixels * rng.normal(1, 0.06) + rng.normal(0, 4, 3)
        blend(picture, person.top, left, pixels.astype(np.float32), alpha)
        heads.append(((left + wide / 2) / width, (person.top + 0.08 * tall) / height))
    return heads


def finish(picture: np.ndarray, rng: np.random.Generator, path: Path) -> None:
    """Light, focus and noise of another moment; written as JPEG."""
    picture = picture * np.float32(rng.normal(1, 0.04)) + np.float32(rng.normal(0, 3))
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 3))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    image.save(path, quality=90)


def crowd(number: int) -> dict[str, int]:
    """Write a frame of people over the empty scene; its labels."""
    rng = np.random.default_rng(number)
    picture = camera.scene.astype(np.float32)
    chosen = rng.integers(0, len(camera.cutouts), rng.integers(0, camera.most + 1))
    heads = paste(picture, [camera.cutouts[index] for index in chosen], rng)
    finish(picture, rng, camera.folder / "frames" / f"{number:06}.jpg")
    inside = [(min(max(x, 0), 0.999), min(max(y, 0), 0.999)) for x, y in heads]
    return {
        name: sum(low <= x < high and up <= y < down for x, y in inside)
        for name, ((low, high), (up, down)) in parts().items()
    }


def change(number: int) -> dict[str, int]:
    """Write a training frame with some who stand alone painted over and others pasted in; its count."""
    rng = np.random.default_rng([number, 1])
    frame = int(rng.integers(len(camera.paths)))
    height, width = camera.scene.shape[:2]
    picture = read(camera.paths[frame], (width, height)).astype(np.float32)
    light = float(np.median(picture - camera.scene))
    as_it_was = rng.random() < 0.3
    alone = [] if as_it_was else [person for person in camera.cutouts if person.frame == frame]
    gone = [person for person in alone if rng.random() < rng.choice([0.0, 0.3, 0.8])]
    for person in gone:
        tall, wide = person.alpha.shape
        grown = np.pad(person.alpha > 0, 3)
        soft = ndimage.gaussian_filter(ndimage.binary_dilation(grown, iterations=2).astype(np.float32), 1)
        empty = np.pad(camera.scene, ((3, 3), (3, 3), (0, 0)), mode="edge").astype(np.float32) + light
        there = empty[person.top : person.top + tall + 6, person.left : person.left + wide + 6]
        blend(picture, person.top - 3, person.left - 3, there, soft)
    num_new = int(rng.integers(0, 13)) if not as_it_was and rng.random() < 0.8 else 0
    new = [camera.cutouts[index] for index in rng.integers(0, len(camera.cutouts), num_new)]
    paste(picture, new, rng)
    finish(picture, rng, camera.folder / "frames" / f"{number:06}.jpg")
    return {"count": max(0, camera.counts[frame] - len(gone)) + num_new}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="folder of the camera's frames, in order by name")
    parser.add_argument("--first", type=int, required=True, help="how many of them belong to the training split")
    parser.add_argument("--labels", type=Path, help="CSV with a row per frame, in order, and a column `count`")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--number", type=int, default=8000, help="frames to write (default %(default)s)")
    parser.add_argument(
        "--most", type=int, default=60, help="people over the empty scene at most (default %(default)s)"
    )
    parser.add_argument("--width", type=int, help="of the frames written, in pixels; left out: as the frames are")
    args = parser.parse_args()
    if args.output.exists():
        raise ValueError(f"{args.output} exists already: choose another --output")
    paths = sorted(args.frames.iterdir())[: args.first]
    if not 1 <= args.first <= len(paths):
        raise ValueError(f"--first {args.first}: expected 1 or more, and {args.frames} holds {len(paths)} of them")
    counts: list[int] = []
    if args.labels is not None:
        with args.labels.open(encoding="utf-8-sig", newline="") as file:
            counts = [int(row["count"]) for row in csv.DictReader(file)][: args.first]
        if len(counts) != len(paths):
            raise ValueError(f"{args.labels}: expected a row for each of the {len(paths)} frames, found {len(counts)}")
    with Image.open(paths[0]) as first:
        size = first.size if args.width is None else (args.width, round(args.width * first.height / first.width))
    scene = np.median([read(path, size) for path in paths[:: max(1, len(paths) // 150)]], axis=0).astype(np.uint8)
    (args.output / "frames").mkdir(parents=True)
    with Pool() as pool:
        jobs = pool.imap(partial(cut_out, scene=scene), enumerate(paths), 10)
        cutouts = [person for found in tqdm(jobs, "cutting out", len(paths), unit="frame") for person in found]
    if not cutouts:
        raise ValueError(f"{args.frames}: nothing in these frames is as tall and as narrow as a person standing alone")
    shared = Camera(scene, cutouts, paths, counts, args.most, args.output)
    columns = ["count"] if counts else list(parts())
    with (
        Pool(initializer=take, initargs=(shared,)) as pool,
        (args.output / "labels.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.DictWriter(file, ["id", *columns])
        table.writeheader()
        numbers = range(1, args.number + 1)
        for number, labels in enumerate(
            tqdm(pool.imap(change if counts else crowd, numbers, 20), "pasting", args.number, unit="frame"), 1
        ):
            table.writerow({"id": number, **labels})
    (args.output / "messages.txt").write_text(MESSAGES if counts else messages(), encoding="utf-8")
    print(f"{args.output}: {args.number} frames of {len(cutouts):,} people cut out of {len(paths)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"paste_people.py: {error}")
