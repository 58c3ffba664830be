"""Draw a small CCTV video of a shopping arcade, with its labels and questions, for trying everything offline.

    python data_prep/make_sample_cctv.py --output data/raw-sample

Writes frames/seq_000001.jpg and so on, labels.csv (id,count) and messages.txt (Korean and English): the same three
things that prepare_cctv.py wants of real footage. The same seed gives the same bytes. 400 frames take 3 s on one core.

The arcade is a pale floor between two shop fronts. People walk across it, hide one another in part, and leave through
the shops; the light drifts and the camera adds noise. Every figure stays inside the middle square of the frame, because
CLIP's image processor cuts the sides off. How full it is rises and falls within some 40 frames, so that every stretch
of the video sees most counts, while neighbouring frames are near-copies, as in real footage.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from preparing import Parser, command
from preparing.dataset_writer import refuse_existing_output, whole_output

MAX_PEOPLE = 20
SUPERSAMPLING = 3  # drawn larger and reduced, which gives soft edges
CLOTHES = ["#1b3a6b", "#7a1f1f", "#1f5a35", "#3b2a52", "#22303a", "#6b4a12", "#0f4f5c", "#5c1744"]
HAIR = ["#1c1410", "#33241a", "#4a3524"]
MESSAGES = """\
USER: How many people are in this frame?
ASSISTANT: {count} people.

USER: Count the people in the picture.
ASSISTANT: {count} people.

사용자: 이 장면에 사람이 몇 명 있나요?
어시스턴트: {count}명입니다.

사용자: CCTV 화면에 보이는 사람 수를 알려 주세요.
어시스턴트: {count}명입니다.
"""


@dataclass
class Walker:
    x: float  # feet, as a share of the floor's width, 0 to 1
    y: float  # feet, as a share of the floor's depth: 0 far, 1 near
    dx: float  # steps per frame, in the same shares
    dy: float
    clothes: str
    hair: str
    build: float  # height relative to others


def new_walker(rng: np.random.Generator, others: list[Walker]) -> Walker:
    """Someone steps out of a shop: of eight places drawn, the one farthest from everybody else."""
    places = rng.uniform(0.04, 0.96, size=(8, 2))
    x, y = max(places, key=lambda place: min((separation(other, *place) for other in others), default=1.0))
    heading = rng.uniform(0, 2 * math.pi)
    pace = rng.uniform(0.02, 0.05)
    return Walker(
        x,
        y,
        pace * math.cos(heading),
        pace * math.sin(heading),
        str(rng.choice(CLOTHES)),
        str(rng.choice(HAIR)),
        rng.uniform(0.9, 1.1),
    )


def separation(walker: Walker, x: float, y: float) -> float:
    """Distance in pixels between a walker and a place."""
    return math.hypot(walker.x - x, walker.y - y)


def step(walkers: list[Walker], rng: np.random.Generator) -> None:
    """One frame later: everyone walks on, turns at the edge of the floor, and gives way to whoever is too close."""
    for walker in walkers:
        for other in walkers:
            distance = separation(walker, other.x, other.y)
            if other is not walker and distance < 0.16:
                away = 0.35 * (0.16 - distance) / max(distance, 1e-6)
                walker.x += away * (walker.x - other.x)
                walker.y += away * (walker.y - other.y)
        walker.x += walker.dx + rng.normal(0, 0.004)
        walker.y += walker.dy + rng.normal(0, 0.004)
        if not 0.04 < walker.x < 0.96:
            walker.dx, walker.x = -walker.dx, min(max(walker.x, 0.04), 0.96)
        if not 0.04 < walker.y < 0.96:
            walker.dy, walker.y = -walker.dy, min(max(walker.y, 0.04), 0.96)


def crowd_sizes(num_frames: int, rng: np.random.Generator) -> list[int]:
    """People per frame, 1 to MAX_PEOPLE, each about as often: a tide whose pace wanders, so it never repeats itself."""
    phase = np.cumsum(rng.normal(2 * math.pi / 44, 0.06, num_frames)) + rng.uniform(0, 2 * math.pi)
    ripple = np.cumsum(rng.normal(2 * math.pi / 15, 0.10, num_frames))
    tide = 0.5 + np.arcsin(np.sin(phase)) / math.pi + 0.04 * np.sin(ripple)
    return np.clip(np.rint(1 + (MAX_PEOPLE - 1) * tide), 1, MAX_PEOPLE).astype(int).tolist()


def draw_arcade(width: int, height: int) -> Image.Image:
    """The empty scene: floor tiles in the middle square, a shop front with doors on each side."""
    scene = Image.new("RGB", (width, height), "#c9c4b8")
    draw = ImageDraw.Draw(scene)
    wall = (width - min(width, height)) // 2
    for line in range(1, 8):
        y = height * line / 8
        draw.line([(0, y), (width, y)], fill="#bfbaae", width=max(1, height // 200))
    for left, right in ((0, wall), (width - wall, width)):
        if wall:
            draw.rectangle([left, 0, right, height], fill="#8f979c")
            for door in range(4):
                top = height * (door + 0.2) / 4
                draw.rectangle([left + wall * 0.2, top, right - wall * 0.2, top + height * 0.15], fill="#a9c3cf")
    return scene


def draw_walker(draw: ImageDraw.ImageDraw, walker: Walker, width: int, height: int) -> None:
    """Legs, coat, head, on feet at the walker's place; nearer means lower in the frame and larger."""
    side = min(width, height)
    tall = side * (0.15 + 0.05 * walker.y) * walker.build
    wide = tall * 0.40
    x = (width - side) / 2 + side * (0.05 + 0.90 * walker.x)
    feet = height - side + side * (0.22 + 0.76 * walker.y)
    draw.ellipse([x - wide * 0.6, feet - tall * 0.06, x + wide * 0.6, feet + tall * 0.06], fill="#a8a396")  # shadow
    for leg in (-0.22, 0.22):
        draw.line([(x, feet - tall * 0.45), (x + leg * wide, feet)], fill="#26262b", width=max(1, round(wide * 0.28)))
    draw.rounded_rectangle(
        [x - wide / 2, feet - tall * 0.80, x + wide / 2, feet - tall * 0.32], radius=wide * 0.3, fill=walker.clothes
    )
    head = tall * 0.13
    draw.ellipse([x - head, feet - tall - head * 0.2, x + head, feet - tall + head * 1.9], fill="#d9a987")
    draw.pieslice([x - head, feet - tall - head * 0.2, x + head, feet - tall + head * 1.9], 180, 360, fill=walker.hair)


def draw_frame(
    empty: Image.Image, walkers: list[Walker], size: tuple[int, int], light: float, rng: np.random.Generator
) -> Image.Image:
    """The scene with its people, far ones first so that near ones hide them, under `light` (1 is noon), with noise."""
    scene = empty.copy()
    draw = ImageDraw.Draw(scene)
    for walker in sorted(walkers, key=lambda walker: walker.y):
        draw_walker(draw, walker, *scene.size)
    pixels = np.asarray(scene.resize(size, Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels * light + rng.normal(0, 3.0, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def parse_size(text: str) -> tuple[int, int]:
    """`160x120` -> (160, 120) pixels. Raises ArgumentTypeError for anything else."""
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) >= 32 and int(height) >= 32):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT in pixels, each at least 32: 160x120")
    return int(width), int(height)


def parse_num_frames(text: str) -> int:
    """A whole number from 1 to 999999. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or not 1 <= int(text) <= 999_999:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 to 999999")
    return int(text)


def main() -> None:
    """Draw the frames, and write labels.csv and messages.txt beside them."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--frames", type=parse_num_frames, default=400, help="how many (default %(default)s)")
    parser.add_argument("--size", type=parse_size, default=(160, 120), metavar="WxH", help="default 160x120")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args()
    refuse_existing_output(args.output)
    with whole_output(args.output) as folder:
        counts = draw_video(folder, args.frames, args.size, np.random.default_rng(args.seed))
    print(f"{args.frames} frames with {min(counts)} to {max(counts)} people, labels.csv, messages.txt: {args.output}")


def draw_video(folder: Path, num_frames: int, size: tuple[int, int], rng: np.random.Generator) -> list[int]:
    """Frames, labels and messages in `folder`; how many people each frame shows."""
    counts = crowd_sizes(num_frames, rng)
    empty = draw_arcade(size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    walkers: list[Walker] = []
    (folder / "frames").mkdir()
    for number, count in enumerate(tqdm(counts, desc="drawing", unit="frame"), start=1):
        step(walkers, rng)
        while len(walkers) < count:
            walkers.append(new_walker(rng, walkers))
        while len(walkers) > count:  # whoever is nearest to a shop goes in
            walkers.remove(max(walkers, key=lambda walker: abs(walker.x - 0.5)))
        light = 1.0 + 0.12 * math.sin(2 * math.pi * number / 150)
        frame = draw_frame(empty, walkers, size, light, rng)
        frame.save(folder / "frames" / f"seq_{number:06}.jpg", quality=90)
    (folder / "messages.txt").write_text(MESSAGES, encoding="utf-8")
    labels = "".join(f"{number},{count}\n" for number, count in enumerate(counts, start=1))
    (folder / "labels.csv").write_text("id,count\n" + labels, encoding="utf-8")
    return counts


if __name__ == "__main__":
    command.run(main)
