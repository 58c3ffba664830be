"""Turn CCTV frames, their head counts and question templates into the dataset that training opens.

    python data_prep/prepare_cctv.py --frames data/raw-sample/frames --labels data/raw-sample/labels.csv \
        --messages data/raw-sample/messages.txt --output data/cctv

labels       a table: one column names the frame, by file name or by number (1 is seq_000001.jpg), one is called `count`;
             others as you like. Or what an annotation tool wrote: COCO JSON, CVAT XML, VIA, YOLO, Pascal VOC or LabelMe
             folders, dots on heads (.mat); the objects of --class are counted. How frames were found is printed.
messages.txt dialogues, each a blank line or a rule (---) apart: turns `USER:` / `ASSISTANT:` or `사용자:` / `어시스턴트:`, in
             which {count} or any other column of the labels in braces is filled in. A line `IMAGE: seq_000001.jpg`
             (`이미지:`) ties a dialogue to one frame. Or JSON: {"messages": [{"role": ..., "content": ...}], "image": ...},
             or a list.

Every frame, label and dialogue ends up accepted, or in rejects.csv with a reason. Splits are blocks of time with a gap
between them, because neighbouring frames of a video are near-copies. A video is a folder, a series of numbers in it
(cam1_0001, cam2_0001) or a day in the file names; short ones go whole to one side. The other rules are

    --split ordered --train 800   the first 800 frames to train, all others to test: the published mall protocol
    --split groups                whole videos, or for photos of one folder whole groups of look-alikes, to one side
    --split random                for comparison; the leak report shows what it lets through

1,000 frames of 640x480 take about 5 s on 2 cores.
"""

import argparse
import functools
import hashlib
import random
import re
from pathlib import Path
from typing import Any

import datasets

from preparing import Parser, command, harmless
from preparing.annotations import count_class, read_annotations
from preparing.cctv import check_images, check_numbers, find_frames, find_photos, group_frames, pass_problems_on
from preparing.conversations import IMAGES_FEATURE, MESSAGES_FEATURE
from preparing.dataset_writer import Picture, describe_file, refuse_existing_output, summarise, write_dataset
from preparing.dialogues import check_empty_cells, check_templates, fill_in, read_dialogues, tie_dialogues
from preparing.frame_names import FrameIndex, leave_off_folders
from preparing.images import (
    Seen,
    add_image_flags,
    describe_leaks,
    image_flag_problems,
    near_duplicates,
    report_leaks,
    stack_hashes,
)
from preparing.labels import Labels, match_labels, read_label_table
from preparing.ledger import Ledger
from preparing.records import Dialogue, Frame, settle
from preparing.splits import connected_groups, split_groups, split_in_order, split_videos, split_whole

# Frames on each side of a cut that are left out. On the mall frames, labels 1 frame apart differ by 1.7 people, 10
# apart by 5.2, 100 apart by 7.5, and frames 10 apart look as different as frames 300 apart.
GAP = 10


# Of the frames, in gaps: from here on it is said, with what to do.
COSTLY_GAP = 0.1


def read_labels(args: argparse.Namespace, index: FrameIndex) -> Labels:
    """The labels of a table or of an annotation tool, each tied to its frame."""
    annotations = read_annotations(args.labels) if args.one_row_per is None else None
    if annotations:
        labels = count_class(annotations, args.labels, args.class_names)
        rule = leave_off_folders(index, [label.key for label in labels.items])
        labels.rules += [rule] if rule else []
    else:
        if args.class_names:
            raise ValueError(f"--class means nothing with {args.labels}, a table that counts: leave it out")
        labels = read_label_table(
            args.labels,
            index,
            count_column=args.count_column,
            frame_column=args.frame_column,
            one_row_per=args.one_row_per,
        )
    match_labels(labels, index, args.one_row_per)
    return labels


def split_frames(frames: list[Frame], args: argparse.Namespace) -> tuple[dict[str, list[Frame]], str]:
    """(frames of each split, the rule in words). Frames in a gap are rejected as such."""
    in_gap: list[Frame] = []
    videos: dict[str, list[Frame]] = {}
    for frame in frames:
        videos.setdefault(frame.video, []).append(frame)
    sizes = {"train": 1, "validation": args.validation_size, "test": args.test_size}
    if args.split == "ordered":
        splits, in_gap = split_in_order(frames, args.train, args.validation, args.gap)
        rule = f"ordered: first {args.train} frames to learn from, all later ones to test; validation is the last "
        rule += f"{args.validation} of the first {args.train}, after a gap of {args.gap if args.validation else 0}"
    elif args.split == "random":
        groups = [[frame] for frame in frames]
        splits = split_groups(groups, args.validation_size, args.test_size, args.seed)
        rule = f"random frames, seed {args.seed}: neighbouring frames fall on both sides"
    elif args.split == "groups" and len(videos) > 1:
        splits = split_whole(list(videos.values()), args.validation_size, args.test_size, args.seed, fill=True)
        rule = f"{len(videos):,} whole videos to one side each, seed {args.seed}"
        if empty := [name for name, size in sizes.items() if size and not splits[name]]:
            raise ValueError(
                f"{len(videos)} videos ({', '.join(list(videos)[:5])}) leave none for {' and '.join(empty)}: leave "
                "validation out (--validation_size 0), or choose another --group_by"
            )
    elif args.split == "groups":
        groups = group_look_alikes(frames, args.near_duplicate_bits)
        splits = split_groups(groups, args.validation_size, args.test_size, args.seed)
        rule = f"{len(groups):,} groups of look-alikes to one side each, seed {args.seed}"
    else:
        named = {str(args.frames / name): of_video for name, of_video in videos.items()}
        splits, in_gap, num_whole = split_videos(named, args.validation_size, args.test_size, args.gap, args.seed)
        rule = f"blocks of time in each of {len(videos):,} videos: train, then validation, then test, {args.gap} frames left "
        rule += "out between"
        if num_whole:
            rule += f"; {num_whole:,} of the videos are too short for that and went whole to one side, seed {args.seed}"
    for frame in in_gap:
        frame.reject("split_gap", "left out between two splits, because it looks like frames on both sides")
    return splits, rule


def group_look_alikes(frames: list[Frame], max_bits: int) -> list[list[Frame]]:
    """Frames whose difference hashes differ in at most `max_bits` of 256, and what joins them, as one group."""
    hashes = stack_hashes([frame.difference_hash for frame in frames])
    alike = near_duplicates(hashes, hashes, max_bits)
    return [[frames[place] for place in group] for group in connected_groups(len(frames), alike)]


def describe_rejects(frames: list[Frame], labels: Labels, dialogues: list[Dialogue]) -> str:
    """What was rejected before the split: few frames are often what is left of many. "" where nothing was."""
    ledger = Ledger()
    for kind, items in (("frames", frames), ("labels", labels.items), ("dialogues", dialogues)):
        settle(ledger, kind, items)
    return f"What was read, and why it was rejected:\n{ledger.table()}" if ledger.rejects else ""


def describe_gaps(frames: list[Frame], photos: set[str], args: argparse.Namespace) -> str:
    """What the gaps cost, if it is much, and what to do about it; "" otherwise."""
    num_in_gap = sum(frame.problem is not None and frame.problem[0] == "split_gap" for frame in frames)
    if num_in_gap <= COSTLY_GAP * len(frames):
        return ""
    words = f"the gaps between the splits leave out {num_in_gap:,} of {len(frames):,} frames "
    words += f"({num_in_gap / len(frames):.0%}): a --gap smaller than {args.gap} leaves out fewer"
    if photos:
        words += "; neighbours look no more alike than any two frames here, so --split groups, which has no gap, leaks no more"
    return words


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
    """A row of the dataset from a frame and a dialogue, filled in with the frame's label."""
    frame, dialogue = pair
    values = frame.label.values
    return {
        "messages": [
            {"role": message["role"], "content": fill_in(message["content"], values)} for message in dialogue.messages
        ],
        # The file's own bytes: nothing is encoded a second time.
        "images": [Picture(frame.sha256, frame.path.name, frame.path.read_bytes)],
        "image_id": frame.image_id,
        "count": frame.label.count,
        **{name: values[name] for name in extra_columns},
    }


def describe_files(folder: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """One hash for many files: SHA-256 over the lines `sha256  name`, as sha256sum prints them."""
    lines = [f"{digest}  {name}\n" for name, digest in hashes.items()]
    return {"path": str(folder), "files": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def describe_labels(path: Path, labels: Labels) -> dict[str, Any]:
    """Path, size and SHA-256 of the label files, for the manifest."""
    if path.is_file():
        return describe_file(path)
    names = {str(file.relative_to(path)): describe_file(file)["sha256"] for file in labels.files}
    return describe_files(path, names)


def parse_arguments() -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--frames", type=Path, required=True, help="folder of images, one subfolder per video if several"
    )
    parser.add_argument(
        "--labels", type=Path, required=True, help="a table, or a file or folder that an annotation tool wrote"
    )
    parser.add_argument("--messages", type=Path, required=True, help="messages.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--count_column", help="column of the table that counts people (default: count, or a name like it)"
    )
    parser.add_argument("--frame_column", help="column of the table that names the frame (default: found and printed)")
    parser.add_argument(
        "--number_offset", type=int, help="added to frame numbers in the labels: 1 where 0 means the file of number 1"
    )
    parser.add_argument(
        "--one_row_per",
        choices=["person", "region"],
        help="what a row is where a frame has several: a person (rows are counted), or a region that repeats the count",
    )
    parser.add_argument(
        "--class",
        dest="class_names",
        nargs="+",
        metavar="NAME",
        help="classes of an annotation tool that are counted (default: its only one)",
    )
    parser.add_argument(
        "--questions_per_frame", default="1", help="dialogues drawn for each frame, or all (default %(default)s)"
    )
    parser.add_argument(
        "--split", choices=["blocks", "ordered", "groups", "random"], default="blocks", help="default %(default)s"
    )
    parser.add_argument(
        "--group_by", help="what is one video: folder, or a column such as camera, clip or day (blocks and groups)"
    )
    parser.add_argument("--validation_size", type=float, help="share of the frames, not for ordered (default 0.1)")
    parser.add_argument("--test_size", type=float, help="share of the frames, not for ordered (default 0.2)")
    parser.add_argument("--train", type=int, help="frames to learn from, ordered")
    parser.add_argument("--validation", type=int, help="of them the last so many to validate, ordered (default 0)")
    parser.add_argument("--gap", type=int, help=f"frames left out between splits, blocks and ordered (default {GAP})")
    parser.add_argument("--seed", type=int, default=0, help="for drawing dialogues and splits (default 0)")
    add_image_flags(parser)
    args = parser.parse_args()
    if problems := find_argument_problems(args):
        raise ValueError("\n".join(problems))
    return args


def find_argument_problems(args: argparse.Namespace) -> list[str]:
    """One sentence per mistake. Flags that were left out get the default that their split rule has."""
    problems = []
    if not args.frames.is_dir():
        problems.append(f"--frames {args.frames} is not a folder")
    if not args.labels.exists():
        problems.append(f"--labels {args.labels} is not a file or folder")
    if not args.messages.is_file():
        problems.append(f"--messages {args.messages} is not a file")
    shares = {"validation_size": 0.1, "test_size": 0.2}
    reads: dict[str, dict[str, Any]] = {
        "blocks": {**shares, "gap": GAP, "group_by": None},
        "groups": {**shares, "group_by": None},
        "random": shares,
        "ordered": {"train": None, "validation": 0, "gap": GAP},
    }
    for name in ("validation_size", "test_size", "train", "validation", "gap", "group_by"):
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
    if args.one_row_per == "person" and args.count_column:
        problems.append("--count_column means nothing with --one_row_per person, which counts rows: leave one out")
    problems += image_flag_problems(args)
    sizes = [args.validation_size or 0, args.test_size or 0]
    if min(sizes) < 0 or sum(sizes) >= 1:
        problems.append(
            f"--validation_size {sizes[0]} and --test_size {sizes[1]}: expected shares that leave some to train"
        )
    if args.questions_per_frame != "all" and not re.fullmatch(r"[1-9]\d{0,8}", args.questions_per_frame, re.ASCII):
        problems.append(f"--questions_per_frame {args.questions_per_frame}: expected 1, 2, ... or all")
    return problems


def make_features(extra_columns: list[str]) -> datasets.Features:
    """Column types of the dataset; the label's further columns are text."""
    return datasets.Features(
        {
            "messages": MESSAGES_FEATURE,
            "images": IMAGES_FEATURE,
            "image_id": datasets.Value("string"),
            "count": datasets.Value("int64"),
            **{name: datasets.Value("string") for name in extra_columns},
        }
    )


def main() -> None:
    """Frames, labels and dialogues -> dataset, manifest and ledger; a mistake ends it with one message."""
    args = parse_arguments()
    refuse_existing_output(args.output)

    # Read.
    frames = find_frames(args.frames)
    index = FrameIndex(frames, args.frames, args.number_offset)
    labels = read_labels(args, index)
    dialogues, notes = read_dialogues(args.messages)
    print(harmless("\n".join(f"{args.labels}: {rule}" for rule in labels.rules)))
    print("".join(f"{args.messages}: {note}\n" for note in notes), end="")

    # Check: what belongs together, then each on its own, then against each other.
    index.left_off = 0
    tie_dialogues(dialogues, index)
    check_templates(dialogues, labels.columns, labels.count_names)
    check_empty_cells(dialogues, labels.items)
    pass_problems_on(frames, labels.items, dialogues)
    check_images(frames, args.max_pixels)
    group_frames([frame for frame in frames if not frame.problem], args.group_by, labels)
    pass_problems_on(frames, labels.items, dialogues)
    accepted = [frame for frame in frames if not frame.problem]
    check_numbers(dialogues, accepted)

    # Split, and give every frame its dialogues.
    rule, rows, leaks, photos = "nothing to split", {}, {}, set()
    if accepted:
        photos = find_photos(accepted)
        try:
            splits, rule = split_frames(accepted, args)
        except ValueError as error:
            raise ValueError(f"{error}\n{describe_rejects(frames, labels, dialogues)}".rstrip()) from error
        per_frame = None if args.questions_per_frame == "all" else int(args.questions_per_frame)
        pass_problems_on(frames, labels.items, dialogues)
        rows = choose_rows(splits, dialogues, per_frame, args.seed)
        pass_problems_on(frames, labels.items, dialogues)
        seen = {name: [see(frame, photos) for frame in of_split] for name, of_split in splits.items()}
        leaks = report_leaks(seen, args.near_duplicate_bits, max_frames_apart=GAP)

    # Write.
    ledger = Ledger()
    settle(ledger, "frames", frames)
    settle(ledger, "labels", labels.items)
    if labels.marks:
        settle(ledger, "marks", labels.marks)
    settle(ledger, "dialogues", dialogues)
    hashes = {frame.image_id: frame.sha256 for frame in frames if frame.sha256}
    write_dataset(
        args.output,
        rows,
        make_features(labels.extra_columns),
        ledger=ledger,
        sources=[
            describe_files(args.frames, hashes),
            describe_labels(args.labels, labels),
            describe_file(args.messages),
        ],
        arguments=vars(args),
        split_rule=rule,
        make_row=functools.partial(make_row, extra_columns=labels.extra_columns),
        label_rules=labels.rules,
        frames={name: len({frame.image_id for frame, _ in pairs}) for name, pairs in rows.items()},
        leak_report=leaks,
    )
    print(summarise(args.output, ledger, {name: len(pairs) for name, pairs in rows.items()}))
    print("\n".join(filter(None, (describe_gaps(accepted, photos, args), describe_leaks(leaks)))))


def see(frame: Frame, photos: set[str]) -> Seen:
    """A frame for the leak report. Of photos, neighbouring numbers mean nothing: each is a video of its own."""
    video = f"{frame.video}/{frame.image_id}" if frame.video in photos else frame.video
    return Seen(frame.image_id, video, frame.time, frame.difference_hash)


if __name__ == "__main__":
    command.run(main)
