"""CCTV frames: finds them, decodes them, and checks what is said of them against their labels."""

import functools
import os
from pathlib import Path

import numpy as np

from finetuning.data.pictures import SUFFIXES, is_litter
from finetuning.tasks.count_parser import parse_count
from preparing.dialogues import fill_in
from preparing.frame_names import count_in_videos, natural_order, place_in_time
from preparing.images import inspect_images, is_inside, stack_hashes
from preparing.labels import Labels
from preparing.records import Dialogue, Frame, Label

# Fewer frames do not tell whether neighbours look alike.
FEWEST_TO_COMPARE = 12
# Neighbours in a video differ in at most this share of the bits in which any two of its frames differ.
LOOK_ALIKE = 0.9


def find_frames(folder: Path) -> list[Frame]:
    """Every file below `folder`, in order of folder and frame number; what is no image carries its problem."""
    frames = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]  # os.walk does not enter them
        for name in [*files, *linked]:
            path = Path(parent) / name
            video = path.parent.relative_to(folder).as_posix()
            image_id = path.relative_to(folder).as_posix()
            frame = Frame(str(path), None, image_id=image_id, path=path, folder=video, video=video)
            if not is_inside(path, folder):
                frame.reject("outside_folder", f"it links to {path.resolve()}, outside {folder}")
            elif not path.is_file():
                frame.reject("not_an_image", "it is a link to a folder, or no regular file")
            elif is_litter(path.relative_to(folder)):
                frame.reject("not_an_image", "an operating system left it there, and it holds no picture")
            elif path.suffix.lower() not in SUFFIXES:
                frame.reject("not_an_image", f"expected one of {' '.join(SUFFIXES)}")
            frames.append(frame)
    frames.sort(key=lambda frame: (frame.video, natural_order(frame.path.name)))
    place_in_time(frames)
    return frames


def group_frames(frames: list[Frame], group_by: str | None, labels: Labels) -> None:
    """Makes a video of all frames of one folder, or of one value of a column: a camera, a clip, a day."""
    if group_by is None:
        return
    if group_by != "folder" and group_by not in labels.columns:
        raise ValueError(f"--group_by {group_by!r}: expected folder, or one of the columns {', '.join(labels.columns)}")
    for frame in frames:
        frame.video = frame.folder if group_by == "folder" else frame.label.values[group_by]
        if not frame.video:
            differs = group_by in frame.label.differing
            detail = f"{group_by} {'differs between the rows of this frame' if differs else 'is empty'} ({frame.label.where})"
            frame.reject("empty_cell", f"{detail}, but --group_by needs it")
    count_in_videos(frame for frame in frames if not frame.problem)


def find_photos(frames: list[Frame]) -> set[str]:
    """Videos that are none: frames with neighbouring times look no more alike than any two frames.

    Compared are medians of differing bits of 256. The mall frames have 35 between neighbours and 64 between frames 300 apart.
    """
    videos: dict[str, list[Frame]] = {}
    for frame in frames:
        videos.setdefault(frame.video, []).append(frame)
    photos = set()
    for name, of_video in videos.items():
        if len(of_video) < FEWEST_TO_COMPARE:
            continue
        ordered = sorted(of_video, key=lambda frame: frame.time)
        hashes = stack_hashes([frame.difference_hash for frame in ordered])
        order = np.random.default_rng(0).permutation(len(hashes))
        neighbours, any_two = (
            np.median(np.bitwise_count(left ^ right).sum(axis=1))
            for left, right in ((hashes[1:], hashes[:-1]), (hashes[order], hashes[np.roll(order, 1)]))
        )
        if neighbours > LOOK_ALIKE * any_two:
            photos.add(name)
    return photos


def check_numbers(dialogues: list[Dialogue], frames: list[Frame]) -> None:
    """Rejects answers whose number, read as the scorer reads it, is not the label of a frame they are for."""
    read_number = functools.lru_cache(maxsize=None)(parse_count)
    for dialogue in dialogues:
        if dialogue.problem:
            continue
        for frame in [dialogue.frame] if dialogue.frame else frames:
            label = frame.label
            if dialogue.frame and any(not label.values[name] for name in set().union(*dialogue.fields)):
                dialogue.reject("empty_cell", f"a column it uses is empty in {label.where}")
                break
            for message, names in zip(dialogue.messages, dialogue.fields, strict=True):
                # An answer made of other columns alone states those, not the number of people.
                if message["role"] != "assistant" or (names and "count" not in names):
                    continue
                answer = fill_in(message["content"], label.values)
                stated = read_number(answer)
                if stated is not None and stated != label.count:
                    detail = f"{answer!r:.80} says {stated}, but {label.where} says {label.count}"
                    advice = "" if dialogue.frame else "; use {count}, or tie the dialogue to a frame with IMAGE:"
                    dialogue.reject("contradicts_label", detail + advice)
            if dialogue.problem:
                break


def check_images(frames: list[Frame], max_pixels: int) -> None:
    """Decodes every labelled frame once; of byte-identical files the first is kept."""
    candidates = [frame for frame in frames if not frame.problem]
    first: dict[str, Frame] = {}
    inspections = inspect_images([frame.path for frame in candidates], Path.read_bytes, max_pixels)
    for frame, inspection in zip(candidates, inspections, strict=True):
        frame.sha256, frame.difference_hash = inspection.sha256, inspection.difference_hash
        if inspection.problem:
            frame.reject(*inspection.problem)
        elif frame.sha256 in first:
            frame.reject("duplicate_image", f"it is byte for byte {first[frame.sha256].image_id}")
        else:
            first[frame.sha256] = frame


def pass_problems_on(frames: list[Frame], labels: list[Label], dialogues: list[Dialogue]) -> None:
    """What hangs on a rejected thing is rejected too."""
    for frame in frames:
        if frame.label is None:
            frame.reject("unlabelled", "no label names it")
        elif frame.label.problem:
            frame.reject("label_rejected", f"{frame.label.where} {frame.label.problem[0]}")
    for item in [*labels, *dialogues]:
        if item.frame and item.frame.problem:
            item.reject("frame_rejected", f"{item.frame.image_id}: {item.frame.problem[0]}")
