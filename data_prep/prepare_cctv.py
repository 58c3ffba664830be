"""Turn CCTV frames, their head counts and question templates into the dataset that training opens.

    python data_prep/prepare_cctv.py --frames data/raw-sample/frames --labels data/raw-sample/labels.csv \
        --messages data/raw-sample/messages.txt --output data/cctv

labels.csv   first column: frame number or file name (1 is seq_000001.jpg); a column `count`; others as you like.
messages.txt dialogues, each a blank line apart: turns `USER:` / `ASSISTANT:` or `사용자:` / `어시스턴트:`, in which {count}
             or any other column of labels.csv in braces is filled in. A line `IMAGE: seq_000001.jpg` (`이미지:`) ties a
             dialogue to one frame. Or JSON: {"messages": [{"role": ..., "content": ...}], "image": ...}, or a list.

Every frame, label and dialogue ends up accepted, or in rejects.csv with a reason. Splits are blocks of time with a gap
between them, because neighbouring frames of a video are near-copies; the other rules are

    --split ordered --train 800   the first 800 frames to train, all others to test: the published mall protocol
    --split random                for comparison; the leak report shows what it lets through

1,000 frames of 640x480 take about 5 s on 2 cores.
"""

import argparse
import functools
import hashlib
import random
import re
import sys
from pathlib import Path
from typing import Any

import datasets

from preparing.cctv import (
    Dialogue,
    Frame,
    FrameIndex,
    check_empty_cells,
    check_images,
    check_numbers,
    check_templates,
    fill_in,
    find_frames,
    match_labels,
    pass_problems_on,
    read_dialogues,
    read_labels,
    settle,
    tie_dialogues,
)
from preparing.conversations import IMAGES_FEATURE, MESSAGES_FEATURE, RESERVED_COLUMNS
from preparing.dataset_writer import describe_file, refuse_existing_output, summarise, write_dataset
from preparing.images import Seen, add_image_flags, describe_leaks, image_flag_problems, report_leaks
from preparing.ledger import Ledger
from preparing.splits import split_groups, split_in_order, split_into_blocks

# Frames on each side of a cut that are left out. On the mall frames, labels 1 frame apart differ by 1.7 people, 10
# apart by 5.2, 100 apart by 7.5, and frames 10 apart look as different as frames 300 apart.
GAP = 10


def split_frames(frames: list[Frame], args: argparse.Namespace) -> tuple[dict[str, list[Frame]], str]:
    """(frames of each split, the rule in words). Frames in a gap are rejected as such."""
    if args.split == "ordered":
        splits, in_gap = split_in_order(frames, args.train, args.validation, args.gap)
        rule = f"ordered: first {args.train} frames to learn from, all later ones to test; validation is the last "
        rule += f"{args.validation} of the first {args.train}, after a gap of {args.gap if args.validation else 0}"
    elif args.split == "random":
        groups = [[frame] for frame in frames]
        splits, in_gap = split_groups(groups, args.validation_size, args.test_size, args.seed), []
        rule = f"random frames, seed {args.seed}: neighbouring frames fall on both sides"
    else:
        splits, in_gap = {"train": [], "validation": [], "test": []}, []
        too_short = []
        for video in dict.fromkeys(frame.video for frame in frames):
            of_video = [frame for frame in frames if frame.video == video]
            try:
                blocks, gap = split_into_blocks(of_video, args.validation_size, args.test_size, args.gap)
            except ValueError as error:
                too_short.append(f"{args.frames / video}: {error}")
                continue
            in_gap += gap
            for name, block in blocks.items():
                splits[name] += block
        if too_short:
            raise ValueError("\n".join(too_short))
        rule = f"blocks of time in each folder: train, then validation, then test, {args.gap} frames left out between"
    for frame in in_gap:
        frame.reject("split_gap", "left out between two splits, because it looks like frames on both sides")
    return splits, rule


def choose_rows(
    splits: dict[str, list[Frame]], dialogues: list[Dialogue], questions_per_frame: int | None, seed: int
) -> dict[str, list[tuple[Frame, Dialogue]]]:
    """For each frame its own dialogues and `questions_per_frame` (None: all) of those that fit any frame."""
    usable = [dialogue for dialogue in dialogues if not dialogue.problem]
    for_any = [dialogue for dialogue in usable if not dialogue.frame]
    own: dict[int, list[Dialogue]] = {}
    for dialogue in usable:
        if dialogue.frame:
            own.setdefault(id(dialogue.frame), []).append(dialogue)
    if questions_per_frame is not None and for_any and questions_per_frame > len(for_any):
        raise ValueError(
            f"--questions_per_frame {questions_per_frame}, but only {len(for_any)} accepted dialogues fit any frame: "
            f"write more, or use --questions_per_frame all"
        )
    number = len(for_any) if questions_per_frame is None else min(questions_per_frame, len(for_any))
    rows: dict[str, list[tuple[Frame, Dialogue]]] = {}
    for name, frames in splits.items():
        rows[name] = []
        for frame in frames:
            # Seeded by the frame too, so that the choice for one frame does not hang on what other frames there are.
            drawn = random.Random(f"{seed} {frame.image_id}").sample(for_any, number)
            chosen = [*own.get(id(frame), []), *drawn]
            if not chosen:
                frame.reject("no_dialogue", "no accepted dialogue is for this frame or for any frame")
            rows[name] += [(frame, dialogue) for dialogue in chosen]
    return rows


def make_row(pair: tuple[Frame, Dialogue], extra_columns: list[str]) -> dict[str, Any]:
    frame, dialogue = pair
    values = frame.label.values
    return {
        "messages": [
            {"role": message["role"], "content": fill_in(message["content"], values)} for message in dialogue.messages
        ],
        # The file's own bytes: nothing is encoded a second time.
        "images": [{"bytes": frame.path.read_bytes(), "path": frame.path.name}],
        "image_id": frame.image_id,
        "count": frame.label.count,
        **{name: values[name] for name in extra_columns},
    }


def describe_folder(folder: Path, frames: list[Frame]) -> dict[str, Any]:
    """One hash for all frames that were decoded: SHA-256 over the lines `sha256  image_id`, as sha256sum prints them."""
    lines = [f"{frame.sha256}  {frame.image_id}\n" for frame in frames if frame.sha256]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return {"path": str(folder), "files": len(lines), "sha256": digest}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--frames", type=Path, required=True, help="folder of images, one subfolder per video if several"
    )
    parser.add_argument("--labels", type=Path, required=True, help="labels.csv")
    parser.add_argument("--messages", type=Path, required=True, help="messages.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--questions_per_frame", default="1", help="dialogues drawn for each frame, or all (default %(default)s)"
    )
    parser.add_argument(
        "--split", choices=["blocks", "ordered", "random"], default="blocks", help="default %(default)s"
    )
    parser.add_argument("--validation_size", type=float, help="share of the frames, blocks and random (default 0.1)")
    parser.add_argument("--test_size", type=float, help="share of the frames, blocks and random (default 0.2)")
    parser.add_argument("--train", type=int, help="frames to learn from, ordered")
    parser.add_argument("--validation", type=int, help="of them the last so many to validate, ordered (default 0)")
    parser.add_argument("--gap", type=int, help=f"frames left out between splits, blocks and ordered (default {GAP})")
    parser.add_argument("--seed", type=int, default=0, help="for drawing dialogues and the random split (default 0)")
    add_image_flags(parser)
    args = parser.parse_args()
    problems = []
    if not args.frames.is_dir():
        problems.append(f"--frames {args.frames} is not a folder")
    problems += [
        f"--{name} {path} is not a file"
        for name, path in (("labels", args.labels), ("messages", args.messages))
        if not path.is_file()
    ]
    reads = {
        "blocks": {"validation_size": 0.1, "test_size": 0.2, "gap": GAP},
        "random": {"validation_size": 0.1, "test_size": 0.2},
        "ordered": {"train": None, "validation": 0, "gap": GAP},
    }
    for name in ("validation_size", "test_size", "train", "validation", "gap"):
        if name not in reads[args.split]:
            if getattr(args, name) is not None:
                problems.append(f"--{name} means nothing with --split {args.split}: leave it out")
        elif getattr(args, name) is None:
            setattr(args, name, reads[args.split][name])
    if args.split == "ordered" and args.train is None:
        problems.append("--split ordered needs --train: how many frames to learn from")
    for name in ("train", "validation", "gap"):
        if (getattr(args, name) or 0) < 0:
            problems.append(f"--{name} {getattr(args, name)}: expected 0 or more")
    problems += image_flag_problems(args)
    shares = [args.validation_size or 0, args.test_size or 0]
    if min(shares) < 0 or sum(shares) >= 1:
        problems.append(
            f"--validation_size {shares[0]} and --test_size {shares[1]}: expected shares that leave some to train"
        )
    if args.questions_per_frame != "all" and not re.fullmatch(r"[1-9]\d{0,8}", args.questions_per_frame, re.ASCII):
        problems.append(f"--questions_per_frame {args.questions_per_frame}: expected 1, 2, ... or all")
    if problems:
        raise ValueError("\n".join(problems))
    return args


def main() -> None:
    args = parse_arguments()
    refuse_existing_output(args.output)

    # Read.
    labels, columns = read_labels(args.labels)
    dialogues = read_dialogues(args.messages)
    frames = find_frames(args.frames)

    # Check: what belongs together, then each on its own, then against each other.
    index = FrameIndex(frames, args.frames)
    match_labels(labels, index)
    tie_dialogues(dialogues, index)
    check_templates(dialogues, columns)
    check_empty_cells(dialogues, labels)
    pass_problems_on(frames, labels, dialogues)
    check_images(frames, args.max_pixels)
    pass_problems_on(frames, labels, dialogues)
    accepted = [frame for frame in frames if not frame.problem]
    check_numbers(dialogues, accepted)

    # Split, and give every frame its dialogues.
    rule, rows, leaks = "nothing to split", {}, {}
    if accepted:
        splits, rule = split_frames(accepted, args)
        per_frame = None if args.questions_per_frame == "all" else int(args.questions_per_frame)
        pass_problems_on(frames, labels, dialogues)
        rows = choose_rows(splits, dialogues, per_frame, args.seed)
        pass_problems_on(frames, labels, dialogues)
        seen = {
            name: [Seen(frame.image_id, frame.video, frame.time, frame.difference_hash) for frame in of_split]
            for name, of_split in splits.items()
        }
        leaks = report_leaks(seen, args.near_duplicate_bits, max_frames_apart=GAP)

    # Write.
    ledger = Ledger()
    settle(ledger, "frames", frames)
    settle(ledger, "labels", labels)
    settle(ledger, "dialogues", dialogues)
    extra_columns = [name for name in columns if name != "count" and name not in RESERVED_COLUMNS]
    features = datasets.Features(
        {
            "messages": MESSAGES_FEATURE,
            "images": IMAGES_FEATURE,
            "image_id": datasets.Value("string"),
            "count": datasets.Value("int64"),
            **{name: datasets.Value("string") for name in extra_columns},
        }
    )
    write_dataset(
        args.output,
        rows,
        features,
        ledger=ledger,
        sources=[describe_folder(args.frames, frames), describe_file(args.labels), describe_file(args.messages)],
        arguments=vars(args),
        split_rule=rule,
        make_row=functools.partial(make_row, extra_columns=extra_columns),
        frames={name: len({frame.image_id for frame, _ in pairs}) for name, pairs in rows.items()},
        leak_report=leaks,
    )
    print(summarise(args.output, ledger, {name: len(pairs) for name, pairs in rows.items()}))
    print(describe_leaks(leaks))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
