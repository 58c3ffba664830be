"""Which frame is meant: frames are named by their whole name or by their number, and never by digits of a hash."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from finetuning.data.pictures import SUFFIXES, is_litter
from preparing.images import find_inside
from preparing.records import Frame
from preparing.text_files import normalise_name

# What annotation tools put before or behind a name. Names are lower case here.
_uuid = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_hash = r"(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]"  # hexadecimal with a digit and a letter: no date, no number
HASHES = (
    re.compile(r"(?P<stem>.+)_(?:jpe?g|png|webp|bmp|tiff?|gif)\.rf\.\w+"),  # Roboflow: seq_1_jpg.rf.0ab4...
    re.compile(rf"(?P<stem>.+?)[._-]{_uuid}"),
    re.compile(rf"{_uuid}[._-](?P<stem>.+)"),
    re.compile(rf"(?P<stem>.+?)[._-]{_hash}{{8,}}"),
    re.compile(rf"{_hash}{{8}}-(?P<stem>.+)"),  # Label Studio's uploads: 1f2e3d4c-seq_1
)
# Days as names write them: 20251129, 2025-11-29, 29.11.2025, 251129_100000, 29Nov2025, 2025년11월29일, seconds or milliseconds
# since 1970.
_year, _month, _day = r"(?:19|20)\d\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_month_name = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
_time = r"(?:[01]\d|2[0-3])[0-5]\d[0-5]\d"
DAYS = (
    re.compile(
        rf"(?<!\d)(?P<day>{_year}(?P<mark>[-_.]?){_month}(?P=mark){_day})(?=\D|$|{_time}(?!\d)|{_time}\d{{3}}(?!\d))"
    ),
    re.compile(rf"(?<!\d)(?P<day>{_day}(?P<mark>[-_.]){_month}(?P=mark){_year})(?!\d)"),
    re.compile(rf"(?<!\d)(?P<day>\d\d{_month}{_day})(?=[-_t]{_time}(?!\d))"),
    re.compile(rf"(?<!\d)(?P<day>{_year}(?:년[-_ ]?\d\d?월[-_ ]?\d\d?일|年\d\d?月\d\d?日))"),
    re.compile(rf"(?<!\d)(?P<day>\d\d?[-_. ]?{_month_name}[-_. ]?{_year})(?!\d)"),
    re.compile(rf"(?P<day>(?<![a-z]){_month_name}[-_. ]?\d\d?[-_., ]{{1,2}}{_year})(?!\d)"),
)
LONGEST_NAME = 200  # a longer one may be more than the file system can be asked for
SECONDS = re.compile(r"(?<!\d)(?P<seconds>1[4-9]\d{8})(?:\d{3})?(?!\d)")


def natural_order(name: str) -> list[Any]:
    """Sort key that puts frame_2 before frame_10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", normalise_name(name))
    ]


def original_stem(stem: str) -> str:
    """The stem without the hash that a tool added; `stem` is lower case. The stem itself where no hash is known."""
    if re.fullmatch(_uuid, stem):
        return stem
    found = next((match for pattern in HASHES if (match := pattern.fullmatch(stem))), None)
    return found["stem"] if found else stem


def split_number(stem: str) -> tuple[str, int | None]:
    """("seq_", 7) of "seq_000007"; None for a number where the stem ends in none."""
    digits = None if re.fullmatch(_uuid, stem) else re.search(r"[0-9]+$", stem)
    return (stem[: digits.start()], int(digits[0])) if digits else (stem, None)


def find_day(stem: str) -> tuple[str, str] | None:
    """(what stands before the date, the day) when the stem holds a date or a time since 1970."""
    for pattern in DAYS:
        if match := pattern.search(stem):
            return stem[: match.start()], match["day"]
    if match := SECONDS.search(stem):
        return stem[: match.start()], datetime.fromtimestamp(int(match["seconds"]), UTC).date().isoformat()
    return None


def place_in_time(frames: list[Frame]) -> None:
    """Says of each frame, given in order, of which video it is, when it was taken, and which number names it.

    A folder is one video, unless its names tell several: by a day in them, or by several series of numbers
    (cam1_0001, cam2_0001). `time` is the frame's number, or its place in the video where numbers are missing or repeat,
    and where the name holds a day: then two frames of neighbouring times are neighbours, however far the digits are apart.
    """
    by_folder: dict[str, list[Frame]] = {}
    for frame in frames:
        if frame.path.suffix.lower() in SUFFIXES and not is_litter(Path(frame.image_id)):
            by_folder.setdefault(frame.folder, []).append(frame)
    for folder, of_folder in by_folder.items():
        stems = [original_stem(normalise_name(frame.path.stem)) for frame in of_folder]
        series = [split_number(stem) for stem in stems]
        members = Counter(prefix for prefix, number in series if number is not None)
        several = len(members) > 1 and all(members[prefix] > 1 for prefix, _ in series)
        for frame, stem, (prefix, number) in zip(of_folder, stems, series, strict=True):
            frame.number = number if number is not None and is_series(prefix, members, len(of_folder)) else None
            day = find_day(stem)
            frame.dated = day is not None
            name = "".join(day) if day else prefix if several else ""
            frame.video = f"{folder}/{name.strip('_-. ')}" if name else folder
    count_in_videos(frame for frame in frames if not frame.problem)


def count_in_videos(frames: Iterable[Frame]) -> None:
    """Sets each frame's time: its number, or its place in the video; the frames come in order."""
    videos: dict[str, list[Frame]] = {}
    for frame in frames:
        videos.setdefault(frame.video, []).append(frame)
    for of_video in videos.values():
        times = [None if frame.dated else frame.number for frame in of_video]
        if None in times or len(set(times)) < len(times):
            times = list(range(len(of_video)))
        for frame, time in zip(of_video, times, strict=True):
            frame.time = time


def is_series(prefix: str, members: Counter[str], number_of_files: int) -> bool:
    """Whether numbers behind `prefix` name frames, and are no digits of a hash.

    Where letters stand before the digits that a hash could have, as in 0ab4, at least half of the files must begin so.
    Where the prefix holds a number of its own, one other file must; other prefixes are words.
    """
    word = re.search(r"[^\W_]*$", prefix)[0]
    if word and (re.search(r"\d", word) or set(word) <= set("abcdef")):
        return members[prefix] > 1 and members[prefix] * 2 >= number_of_files
    return members[prefix] > 1 or number_of_files == 1 or not re.search(r"\d", prefix)


class Found(NamedTuple):
    frame: Frame
    by: str  # "name", "number"


class FrameIndex:
    """Finds the frame that a label or a dialogue names."""

    def __init__(self, frames: Iterable[Frame], folder: Path, number_offset: int | None = None) -> None:
        self.folder = folder
        self.number_offset_given = number_offset is not None
        self.number_offset = number_offset or 0
        self.left_off = 0  # leading folders of every name in the labels that are not looked at
        # From exact to loose: each dictionary is asked only where those before it know nothing.
        self.names: list[dict[str, list[Frame]]] = [{} for _ in range(7)]
        self.numbers: dict[int, list[Frame]] = {}
        # A text file beside each picture must not make their common stem ambiguous.
        self.frames = [
            frame for frame in frames if frame.path.suffix.lower() in SUFFIXES and not is_litter(Path(frame.image_id))
        ]
        for frame in self.frames:
            path = normalise_name(frame.image_id)
            folder_part, name = path.rpartition("/")[::2]
            stem, _, suffix = name.rpartition(".")
            original = original_stem(stem)
            inside = "/".join(part for part in folder_part.split("/") if part and part != "images")
            known = (
                path,
                path.rpartition(".")[0],
                f"{inside}/{stem}".lstrip("/"),  # YOLO: train/images/a.jpg and train/labels/a.txt
                name,
                stem,
                f"{original}.{suffix}",
                original,
            )
            for names, key in zip(self.names, known, strict=True):
                names.setdefault(key, []).append(frame)
            if frame.number is not None:
                self.numbers.setdefault(frame.number, []).append(frame)
        self.videos = {normalise_name(name) for frame in self.frames for name in video_names(frame)}

    def numbers_of(self, video: str) -> set[int]:
        """The numbers of all frames of a video; "" stands for all videos."""
        return {
            number
            for number, frames in self.numbers.items()
            if not video or any(is_of_video(frame, video) for frame in frames)
        }

    def find(self, key: str, video: str = "") -> Found | tuple[str, str]:
        """The frame that `key` names, in `video` if one is given, or (reason, detail) when there is not exactly one."""
        wanted = strip_folders(normalise_name(key), self.left_off)
        number = number_named(wanted)
        lookups = [names.get(wanted) for names in self.names]
        if self.number_offset and number is not None:
            lookups = []
        by = ["name"] * len(lookups)
        if number is not None:
            lookups.append(self.numbers.get(number + self.number_offset))
            by.append("number")
        elif "/" in wanted and (number := number_named(wanted.rpartition("/")[2])) is not None:
            video = video or wanted.rpartition("/")[0]
            lookups.append(self.numbers.get(number + self.number_offset))
            by.append("number")
        elif (original := original_stem(stem := PurePosixPath(wanted).stem)) != stem:
            # The labels keep a tool's hash and the files lost it. A file with another hash is another picture.
            parent = wanted.rpartition("/")[0]
            lookups.append(self.names[1].get(f"{parent}/{original}") if parent else self.names[4].get(original))
            by.append("name")
        for found, how in zip(lookups, by, strict=True):
            if found and video:
                found = [frame for frame in found if is_of_video(frame, video)]
            if found and len(found) == 1:
                return Found(found[0], how)
            if found:
                ids = ", ".join(frame.image_id for frame in found[:3])
                return "ambiguous_frame", f"{key!r} fits {len(found)} files ({ids}): write the path inside the folder"
        if wanted.startswith(("/", "..")) or "/../" in wanted or len(wanted) > LONGEST_NAME:
            outside = find_inside(key.strip(), self.folder)
            if isinstance(outside, tuple) and outside[0] != "missing_image":
                return outside
        where = f"{self.folder}, video {video!r}" if video else self.folder
        detail = f"{key!r} fits no image in {where}"
        if number is not None and not self.numbers:
            detail += ": no file name there ends in a number of its own (digits of a hash are none)"
        return "missing_frame", detail


def video_names(frame: Frame) -> set[str]:
    """What a column may call the video that a frame is of: its folder, the folder's last part, its series."""
    return {
        name
        for name in (frame.folder, frame.folder.rpartition("/")[2], frame.video, frame.video.rpartition("/")[2])
        if name
    }


def is_of_video(frame: Frame, video: str) -> bool:
    """Whether the frame is of the video of that name, in any spelling."""
    return normalise_name(video) in map(normalise_name, video_names(frame))


def number_named(key: str) -> int | None:
    """7 of "7", "007" and "7.0", which is how spreadsheets and pandas write 7 in a column with gaps."""
    return int(key.partition(".")[0]) if re.fullmatch(r"[0-9]{1,18}(\.0*)?", key) else None


def strip_folders(key: str, number: int) -> str:
    """A key without its first `number` folders."""
    return "/".join(key.split("/")[number:]) if number else key.removeprefix("./")


def common_folders(keys: Iterable[str]) -> list[str]:
    """The leading folders that all keys share: ["", "home", "me"] of "/home/me/1.jpg" and "/home/me/2.jpg"."""
    common: list[str] | None = None
    for key in keys:
        folders = normalise_name(key).split("/")[:-1]
        if common is None:
            common = folders
        length = next(
            (place for place, pair in enumerate(zip(common, folders, strict=False)) if len(set(pair)) > 1), None
        )
        common = common[: min(len(common), len(folders)) if length is None else length]
        if not common:
            break
    return common or []


def leave_off_folders(index: FrameIndex, keys: list[str]) -> str:
    """Sets how many leading folders of the keys are left off, if the keys lead elsewhere; returns the rule in words.

    Only folders that all keys share are left off, as few as possible, and no folder that the frames have too: a label of
    cam1/7.jpg must not land on cam2/7.jpg.
    """
    common = common_folders(keys)
    best, hits_of_best = 0, 0
    for number in range(len(common) + 1):
        if number and common[number - 1] in index.videos:
            break
        if number and number == len(common) and len({frame.folder for frame in index.frames}) > 1:
            break
        index.left_off = number
        hits = sum(isinstance(index.find(key), Found) for key in keys[:1000])
        if hits > hits_of_best:
            best, hits_of_best = number, hits
    index.left_off = best
    return f"the folder {'/'.join(common[:best])}/ of the labels is left off" if best else ""
