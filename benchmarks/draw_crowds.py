"""Draw crowds over the empty scene of a fixed camera, as a first lesson for a model that has never seen people.

    python benchmarks/draw_crowds.py --frames frames --first 800 --output data/raw-crowds --number 12000

The empty scene is the median of the first frames (those of the training split only), and where people stand follows
where these frames differ from it; no label is read. Writes frames/, labels.csv and messages.txt for prepare_cctv.py.
Labels count the heads in the whole frame, its rows, its columns and its nine parts: many small questions about one
picture teach a small model to look sooner than one large number does. They are the turns of one dialogue, the whole frame
first, so that a frame is one row.
"""

import argparse
import csv
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

ROWS = {"top": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "bottom": (2 / 3, 1)}
COLUMNS = {"left": (0, 1 / 3), "center": (1 / 3, 2 / 3), "right": (2 / 3, 1)}
KOREAN = {"top": "위", "middle": "가운데", "bottom": "아래", "left": "왼쪽", "center": "중앙", "right": "오른쪽"}
# Feet's and body's height as shares of the frame's, read off the mall camera by eye.
FEET, TALL = (0.10, 0.15, 0.25, 0.40, 0.62, 0.80, 1.00, 1.30), (0.05, 0.065, 0.13, 0.16, 0.22, 0.24, 0.27, 0.31)


def parts() -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Name of a column of labels.csv -> (from, to) of x and of y, as shares of the frame."""
    whole = (0, 1)
    return (
        {"count": (whole, whole)}
        | {row: (whole, y) for row, y in ROWS.items()}
        | {column: (x, whole) for column, x in COLUMNS.items()}
        | {f"{row}_{column}": (x, y) for row, y in ROWS.items() for column, x in COLUMNS.items()}
    )


def messages() -> str:
    """The text of messages.txt: the count of the frame, then those of its nine parts or of its rows and columns."""
    cells = [f"{row}_{column}" for row in ROWS for column in COLUMNS]
    dialogues = []
    for names in (cells, [*ROWS, *COLUMNS]):
        english = ["USER: How many people are in view?", "ASSISTANT: {count} people."]
        korean = ["사용자: 사람이 몇 명 있나요?", "어시스턴트: {count}명입니다."]
        for name in names:
            english += [f"USER: How many people are in the {name.replace('_', ' ')}?", f"ASSISTANT: {{{name}}}."]
            place = " ".join(KOREAN[word] for word in name.split("_"))
            korean += [f"사용자: {place}에는 몇 명 있나요?", f"어시스턴트: {{{name}}}명."]
        dialogues += ["\n".join(english), "\n".join(korean)]
    return "\n\n".join(dialogues) + "\n"


def study(paths: list[Path], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The empty scene (height, width, 3), and how often each of its pixels is hidden, a distribution over pixels."""

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as frame:
            return np.asarray(frame.convert("RGB").resize(size))

    # Some 200 frames tell the empty scene, however many there are.
    scene = np.median([read(path) for path in paths[:: max(1, len(paths) // 200)]], axis=0)
    hidden = np.zeros(scene.shape[:2])
    for path in tqdm(paths, "reading", unit="frame"):
        hidden += np.abs(read(path) - scene).max(axis=-1) > 45  # of 255: more than light and noise do
    return scene.astype(np.uint8), hidden / hidden.sum()


def draw(number: int, scene: np.ndarray, hidden: np.ndarray, most: int, folder: Path) -> dict[str, int]:
    """Write frame `number`; its labels."""
    rng = np.random.default_rng(number)
    height, width = hidden.shape
    fine = 2  # drawn larger and reduced, which gives soft edges
    picture = Image.fromarray(scene).resize((width * fine, height * fine))
    canvas = ImageDraw.Draw(picture)
    places = rng.choice(hidden.size, size=rng.integers(0, most + 1), p=hidden.ravel())
    people = []
    for y, x in zip(*np.unravel_index(places, hidden.shape), strict=True):
        # The hidden pixel is somewhere on the body: find feet that are as far below it as a body there is high.
        share = rng.uniform(0.1, 0.9)
        feet = y / height
        for _ in range(4):
            feet = y / height + share * np.interp(feet, FEET, TALL)
        people.append((feet, x / width))
    heads = []
    for feet, x in sorted(people):
        tall = np.interp(feet, FEET, TALL) * rng.uniform(0.85, 1.12) * height * fine
        wide = tall * rng.uniform(0.22, 0.38)
        middle, bottom = x * width * fine, feet * height * fine
        tint = 60 if rng.random() < 0.15 else 12  # most people dress in dark and grey
        coat, trousers = (
            tuple((255 * rng.beta(1.2, 3) + rng.normal(0, tint, 3)).clip(5, 250).astype(int)) for _ in range(2)
        )
        skin = tuple((np.array([200, 150, 125]) * rng.uniform(0.5, 1.05)).astype(int))
        hair = tuple((np.array([60, 45, 35]) * rng.uniform(0.3, 2.5)).astype(int))
        stride = rng.uniform(0, 0.35) * wide
        for side in (-1, 1):
            canvas.line(
                [(middle, bottom - tall * 0.5), (middle + side * stride, bottom)], fill=trousers, width=int(wide * 0.42)
            )
        coat_end = bottom - tall * rng.uniform(0.3, 0.5)
        canvas.rounded_rectangle(
            [middle - wide / 2, bottom - tall * 0.86, middle + wide / 2, coat_end], radius=wide * 0.3, fill=coat
        )
        if rng.random() < 0.4:  # a bag
            at = middle + rng.choice([-1, 1]) * wide * 0.6
            canvas.ellipse(
                [at - wide * 0.25, coat_end - tall * 0.1, at + wide * 0.25, coat_end + tall * 0.05], fill=hair
            )
        head = tall * 0.068
        top = bottom - tall
        canvas.ellipse([middle - head, top, middle + head, top + head * 2.5], fill=hair if rng.random() < 0.6 else skin)
        heads.append((middle / (width * fine), (top + head) / (height * fine)))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    pixels = pixels * rng.normal(1, 0.05) + rng.normal(0, 3) + rng.normal(0, rng.uniform(1, 5), pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "frames" / f"{number:06}.jpg", quality=90)
    inside = [(min(max(x, 0), 0.999), min(max(y, 0), 0.999)) for x, y in heads]
    return {
        name: sum(low <= x < high and up <= y < down for x, y in inside)
        for name, ((low, high), (up, down)) in parts().items()
    }


def main() -> None:
    """Draw the crowds, and write frames, labels and questions to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="folder of the camera's frames, in order by name")
    parser.add_argument("--first", type=int, required=True, help="how many of them belong to the training split")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--number", type=int, default=12000, help="frames to draw (default %(default)s)")
    parser.add_argument("--most", type=int, default=55, help="people in a frame at most (default %(default)s)")
    parser.add_argument("--width", type=int, default=320, help="of the drawn frames, in pixels (default %(default)s)")
    args = parser.parse_args()
    if args.output.exists():
        raise ValueError(f"{args.output} exists already: choose another --output")
    paths = sorted(args.frames.iterdir())[: args.first]
    if not 1 <= args.first <= len(paths):
        raise ValueError(f"--first {args.first}: expected 1 or more, and {args.frames} holds {len(paths)} of them")
    with Image.open(paths[0]) as first:
        size = (args.width, round(args.width * first.height / first.width))
    scene, hidden = study(paths, size)
    (args.output / "frames").mkdir(parents=True)
    with Pool() as pool, (args.output / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["id", *parts()])
        table.writeheader()
        job = partial(draw, scene=scene, hidden=hidden, most=args.most, folder=args.output)
        numbers = range(1, args.number + 1)
        for number, labels in enumerate(tqdm(pool.imap(job, numbers, 20), "drawing", args.number, unit="frame"), 1):
            table.writerow({"id": number, **labels})
    (args.output / "messages.txt").write_text(messages(), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"draw_crowds.py: {error}")
