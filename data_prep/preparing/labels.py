"""Head counts from a table: which column names the frame, which one counts, and which row belongs to which frame."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetuning.data.pictures import SUFFIXES
from preparing.conversations import RESERVED_COLUMNS
from preparing.frame_names import Found, FrameIndex, leave_off_folders, number_named
from preparing.records import Item, Label
from preparing.tables import SEPARATORS, Table, read_table
from preparing.text_files import normalise_name

# Names of columns, written in lower case without spaces and marks.
COUNT_NAMES = {
    "count", "counts", "people", "persons", "heads", "peoplecount", "personcount", "headcount", "countpeople",
    "numpeople", "numpersons", "numheads", "npeople", "npersons", "numberofpeople", "numberofpersons", "peoplenumber",
    "crowdcount", "totalcount", "totalpeople", "gtcount", "groundtruth", "인원", "인원수", "사람수", "명수", "총인원",
    "인원계", "사람", "카운트", "人数",
}  # fmt: skip
FRAME_NAMES = {
    "frame", "frames", "frameid", "frameno", "framenum", "framenumber", "frameindex", "framename", "framefile", "image",
    "imageid", "imageno", "imagenumber", "imagename", "imagefile", "imagepath", "img", "imgid", "imgname", "imgpath",
    "file", "filename", "filepath", "path", "picture", "photo", "프레임", "프레임번호", "이미지", "이미지명", "사진",
    "파일", "파일명", "파일이름",
}  # fmt: skip
# These name a frame where nothing else does; beside a file name they only number the rows.
ROW_NAMES = {"", "id", "no", "index", "idx", "number", "num", "n", "row", "rowid", "seq", "번호", "순번", "연번"}
# These say something of a frame and never which frame it is, even in the first column.
QUANTITIES = COUNT_NAMES | {
    "men", "women", "man", "woman", "male", "female", "males", "females", "adults", "children", "kids", "boys", "girls",
    "age", "time", "timestamp", "second", "seconds", "fps", "width", "height", "score", "camera", "cam", "video", "clip",
    "day", "date", "hour", "weather", "zone", "region", "regionid", "남자", "여자", "남성", "여성", "어른", "아이", "시간",
    "날짜", "카메라", "구역",
}  # fmt: skip
PANDAS_INDEX = re.compile(r"(unnamed: ?\d+|level_0|index)?", re.IGNORECASE)
EXAMPLES = 3


@dataclass
class Labels:
    """Everything that the labels gave."""

    items: list[Label]
    columns: list[str]  # what templates may use
    count_names: set[str] = field(default_factory=lambda: {"count"})  # columns that hold the count itself
    frame_column: str | None = None
    files: list[Path] = field(default_factory=list)
    marks: list[Item] = field(default_factory=list)  # single objects of an annotation tool
    rules: list[str] = field(default_factory=list)  # how all this was read, for people

    @property
    def extra_columns(self) -> list[str]:
        """Columns that go into the dataset beside the count."""
        return [name for name in self.columns if name not in {*self.count_names, *RESERVED_COLUMNS}]


def plain(name: str) -> str:
    """A column's name without case, spaces and signs, to compare it."""
    return re.sub(r"[\W_]+", "", normalise_name(name))


def read_label_table(
    path: Path,
    index: FrameIndex,
    *,
    count_column: str | None = None,
    frame_column: str | None = None,
    one_row_per: str | None = None,
) -> Labels:
    """The labels of a table with a header. ValueError when its columns cannot be told apart: every flag that would is named."""
    table = read_table(path)
    header, rows = table.header, table.rows
    check_header(path, table)
    count_at = None if one_row_per == "person" else find_count_column(path, header, count_column)
    key_at, rules = find_frame_column(path, table, index, count_at, frame_column)
    kept = [
        place
        for place, name in enumerate(header)
        if name or place in (key_at, count_at) or any(len(cells) > place and cells[place] for _, cells in rows)
    ]
    if header[0] == "" and key_at != 0 and 0 in kept:
        kept.remove(0)
        rules.append("the first column has no name and numbers the rows: it is left out")
    reserved = [header[place] for place in kept if place != key_at and header[place] in RESERVED_COLUMNS]
    if taken := [name for name in reserved if plain(name) not in FRAME_NAMES]:
        raise ValueError(
            f"{path} opens with the columns {', '.join(header)}: {', '.join(taken)} means something else to training, "
            "choose another name"
        )
    rules += [f"the column {name!r} can be filled in, and does not go into the dataset" for name in reserved]
    video_at = find_video_column(table, index, {key_at, count_at})
    columns = [header[place] for place in kept]
    labels = Labels([], columns, {"count"}, header[key_at], [path], rules=rules)
    if count_at is not None:
        labels.count_names.add(header[count_at])
        rules.insert(0, f"people are counted in the column {header[count_at]!r}")
    if "count" not in columns:
        columns.append("count")
    if video_at is not None:
        rules.append(f"the column {header[video_at]!r} names the video")
    if table.separator != ",":
        rules.append(f"cells are set apart by a {SEPARATORS.get(table.separator, table.separator)}")
    for line, cells in rows:
        if len(cells) != len(header):
            label = Label(str(path), line, key=cells[min(key_at, len(cells) - 1)], values={})
            label.reject("wrong_number_of_cells", f"{len(cells)} cells under {len(header)} columns")
        else:
            values = {header[place]: cells[place] for place in kept}
            label = Label(str(path), line, key=cells[key_at], values=values)
            label.video = cells[video_at] if video_at is not None else ""
            if count_at is not None:
                read_count(label, cells[count_at], header[count_at], decimal_comma=table.separator != ",")
        labels.items.append(label)
    if one_row_per == "person":
        count_rows(labels)
    return labels


def check_header(path: Path, table: Table) -> None:
    """Raise ValueError where columns with content have no name, or two have the same."""
    header = table.header
    filled = {place for _, cells in table.rows for place, cell in enumerate(cells) if cell}
    nameless = [place for place, name in enumerate(header) if not name and place in filled and place > 0]
    named = [name for name in header if name]
    if nameless or len(set(named)) < len(named):
        raise ValueError(
            f"{path} opens with the columns {', '.join(header) or '(none)'}: expected every column to have a name of its own"
        )
    if len(header) < 2:
        raise ValueError(
            f"{path} opens with the columns {', '.join(header) or '(none)'}: expected a first column that names the frame, "
            "and one other column called count, set apart by commas, semicolons or tabs"
        )


def find_count_column(path: Path, header: list[str], wanted: str | None) -> int:
    """Index of the column of counts. Raises ValueError where there is none, or `wanted` is not it."""
    if wanted is not None:
        if wanted not in header:
            raise ValueError(f"--count_column {wanted!r}: {path} has the columns {', '.join(header)}")
        if wanted != "count" and "count" in header:
            raise ValueError(
                f"--count_column {wanted!r}: {path} also has a column called count, and the dataset calls the number of "
                "people so: rename or remove that column"
            )
        return header.index(wanted)
    if "count" in header:
        return header.index("count")
    found = [name for name in header if plain(name) == "count"] or [
        name for name in header if plain(name) in COUNT_NAMES
    ]
    if len(found) == 1:
        return header.index(found[0])
    if all(number_named(name) is not None or name.lower().endswith(SUFFIXES) for name in header):
        raise ValueError(
            f"{path} opens with the columns {', '.join(header)}: expected their names in the first line, one that names the "
            "frame and one column called count; write them there"
        )
    problem = f"{' and '.join(found)} could each be the number of people" if found else "none is the number of people"
    raise ValueError(
        f"{path} opens with the columns {', '.join(header)}: expected a first column that names the frame, and one other "
        f"column called count; {problem}: name it with --count_column"
    )


def find_frame_column(
    path: Path, table: Table, index: FrameIndex, count_at: int | None, wanted: str | None
) -> tuple[int, list[str]]:
    """(place of the column that names the frame, rules in words). A column of file names wins over numbers of rows.

    Raises ValueError where two columns name different frames and none of the two is a mere number of the row.
    """
    header = table.header
    if wanted is not None:
        if wanted not in header or header.index(wanted) == count_at:
            raise ValueError(
                f"--frame_column {wanted!r}: {path} has the columns {', '.join(header)}, one of them counts"
            )
        key_at = header.index(wanted)
        rule = leave_off_folders(index, column(table, key_at))
        return key_at, [f"frames are named by the column {wanted!r}", *([rule] if rule else [])]
    places = [place for place in range(len(header)) if place != count_at]
    of_files = [place for place in places if names_files(column(table, place), index)]
    by_name = [place for place in of_files if hits(table, place, index)] or of_files
    numbered = [place for place in places if plain(header[place]) in FRAME_NAMES and place not in of_files]
    candidates = by_name or [place for place in numbered if hits(table, place, index)]
    first = 0 in by_name if by_name else 0 in places and is_first_choice(table, index)
    if first or (0 in places and not candidates and plain(header[0]) not in QUANTITIES):
        key_at = 0
    elif candidates:
        key_at = max(candidates, key=lambda place: (hits(table, place, index), -place))
    else:
        raise ValueError(
            f"{path} opens with the columns {', '.join(header)}, and none is known to name the frame: say which, with "
            "--frame_column"
        )
    rule = leave_off_folders(index, column(table, key_at))
    left_off = index.left_off
    for rival in {*by_name, *numbered} - {key_at}:
        refuse_rival(path, table, index, key_at, rival)
    index.left_off = left_off
    rules = [f"frames are named by the column {header[key_at]!r}"]
    rules += [
        f"the column {header[place]!r} numbers the rows, not the frames"
        for place in places
        if place != key_at
        and (plain(header[place]) in ROW_NAMES or PANDAS_INDEX.fullmatch(header[place]))
        and header[place]
    ]
    return key_at, rules + ([rule] if rule else [])


def is_first_choice(table: Table, index: FrameIndex) -> bool:
    """Whether the first column names the frame, in a table without file names: unless it only numbers the rows."""
    name = table.header[0]
    if plain(name) in QUANTITIES:
        return False
    others = [place for place, other in enumerate(table.header) if place and plain(other) in FRAME_NAMES]
    if not any(hits(table, place, index) for place in others):
        return True
    if PANDAS_INDEX.fullmatch(name) or not hits(table, 0, index):
        return False
    cells = column(table, 0)
    return plain(name) in FRAME_NAMES | ROW_NAMES or len(set(cells)) == len(cells)


def refuse_rival(path: Path, table: Table, index: FrameIndex, key_at: int, rival: int) -> None:
    """Raises ValueError when the column `rival` names another frame than the column `key_at` in some row."""
    left_off = index.left_off
    leave_off_folders(index, column(table, rival))
    of_rival = index.left_off
    for line, cells in table.rows:
        if len(cells) != len(table.header):
            continue
        index.left_off = left_off
        found = index.find(cells[key_at])
        index.left_off = of_rival
        other = index.find(cells[rival])
        if isinstance(found, Found) and isinstance(other, Found) and found.frame is not other.frame:
            ours, theirs = table.header[key_at], table.header[rival]
            raise ValueError(
                f"{path}:{line} names two frames: {ours} {cells[key_at]!r} is {found.frame.image_id}, but {theirs} "
                f"{cells[rival]!r} is {other.frame.image_id}. Say which column names the frame: --frame_column {ours!r} or "
                f"--frame_column {theirs!r}"
            )
    index.left_off = left_off


def column(table: Table, place: int) -> list[str]:
    """Filled cells of a column, top to bottom."""
    return [cells[place] for _, cells in table.rows if len(cells) == len(table.header) and cells[place]]


def names_files(cells: Sequence[str], index: FrameIndex) -> bool:
    """Whether most of the first thousand cells end as picture files do, or are whole names of frames without that end."""
    cells = cells[:1000]
    number = sum(
        cell.lower().endswith(SUFFIXES) or (number_named(cell) is None and isinstance(index.find(cell), Found))
        for cell in cells
    )
    return number * 2 > len(cells)


def hits(table: Table, place: int, index: FrameIndex) -> int:
    """How many of the first thousand cells name a frame, in whichever folder."""
    cells = column(table, place)[:1000]
    leave_off_folders(index, cells)
    number = sum(isinstance(found := index.find(cell), Found) or found[0] == "ambiguous_frame" for cell in cells)
    index.left_off = 0
    return number


def find_video_column(table: Table, index: FrameIndex, others: set[int | None]) -> int | None:
    """The first column of whose different cells at least half are names of folders or of series of frames."""
    for place in range(len(table.header)):
        cells = {normalise_name(cell) for cell in column(table, place)}
        if place not in others and cells and len(cells & (index.videos - {"."})) * 2 >= len(cells):
            return place
    return None


def read_count(label: Label, given: str, name: str, *, decimal_comma: bool) -> None:
    """Set the label's count from a cell, or reject the label: a whole number of people, 0 or more."""
    # 7.0 is how spreadsheets and pandas write 7 in a column with gaps; where cells are not set apart by commas, 7,0 too.
    mark = "[.,]" if decimal_comma else r"\."
    if re.fullmatch(rf"[0-9]{{1,9}}({mark}0*)?", given):
        label.count = int(re.split("[.,]", given)[0])
        label.values["count"] = label.values[name] = str(label.count)
    else:
        label.reject("bad_count", f"{name} is {given!r}, expected a whole number of people, 0 or more")


def count_rows(labels: Labels) -> None:
    """The count of a frame is how many rows name it; each row then says the same."""
    number = Counter((label.key, label.video) for label in labels.items)
    for label in labels.items:
        if not label.problem:
            label.count = number[label.key, label.video]
            label.values["count"] = str(label.count)
    labels.rules.append("the rows of a frame are counted: one row per person")


def match_labels(labels: Labels, index: FrameIndex, one_row_per: str | None = None) -> None:
    """Ties each label to its frame. Rows that agree are one label; of rows that do not, none counts.

    Raises ValueError where a question must be answered first: rows that each say 1, numbers that are off by one.
    """
    found_by: Counter[str] = Counter()
    of_frame: dict[int, list[Label]] = {}
    for label in labels.items:
        if not label.key:
            label.reject(
                "missing_frame", "the cell that names the frame is empty, expected a frame number or file name"
            )
            continue
        found = index.find(label.key, label.video)
        if isinstance(found, Found):
            label.frame = found.frame
            of_frame.setdefault(id(found.frame), []).append(label)
            found_by[found.by] += 1
        else:
            label.reject(*found)
    ask_about_numbers(labels, index)
    repeated = [rivals for rivals in of_frame.values() if len(rivals) > 1]
    if one_row_per is None:
        ask_about_rows(labels, repeated)
    settle_repeated_labels(labels, repeated, may_repeat=one_row_per is not None)
    for rivals in of_frame.values():
        rivals[0].frame.label = next((label for label in rivals if not label.problem), rivals[0])
    labels.rules += describe_matches(labels, found_by)


def settle_repeated_labels(labels: Labels, repeated: list[list[Label]], *, may_repeat: bool) -> None:
    """Keeps one of several rows of a frame, or none.

    Rows of one region each may repeat the count of the whole frame, and differ in other columns. They are taken for that
    only where the counts of all frames agree: a count for each region is no count of the frame.
    """
    usable_of = [[label for label in rivals if not label.problem] for rivals in repeated]
    regions = may_repeat or all(len({label.count for label in usable}) < 2 for usable in usable_of)
    num_merged = 0
    for rivals, usable in zip(repeated, usable_of, strict=True):
        shown = [str(label.line) for label in rivals]
        lines = ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
        differing = {
            name
            for name in labels.columns
            if name not in labels.count_names
            and name != labels.frame_column
            and len({label.values[name] for label in usable}) > 1
        }
        counts = {label.count for label in usable}
        if len(counts) > 1 or (differing and not regions):
            for label in usable:
                advice = "write one row for each frame, with their sum if each row counts a part of it"
                label.reject("conflicting_labels", f"lines {lines} label the same frame differently: {advice}")
            continue
        for label in usable[1:]:
            label.reject("duplicate_label", f"lines {lines} say the same of one frame")
        if usable and differing:
            num_merged += 1
            usable[0].differing = differing
            usable[0].values |= dict.fromkeys(differing, "")
    if num_merged:
        labels.rules.append(f"{num_merged:,} frames have several rows that say the same count: each is one label")


def ask_about_rows(labels: Labels, repeated: list[list[Label]]) -> None:
    """Raises ValueError when frames have several rows of which each counts 1: that may be one row per person."""
    if repeated and all(label.count == 1 for label in labels.items if not label.problem):
        label = repeated[0][0]
        raise ValueError(
            f"{label.file}: {len(repeated):,} frames have several rows, such as {label.key!r} with {len(repeated[0])}, and every "
            "row counts 1. If each row is a person, say --one_row_per person (the rows of a frame are counted); if each row "
            "repeats the count of the whole frame, say --one_row_per region"
        )


def ask_about_numbers(labels: Labels, index: FrameIndex) -> None:
    """Raises ValueError when more labels would find a frame if their numbers were shifted: which is meant is not known."""
    if index.number_offset_given:
        return
    numbers: dict[str, set[int]] = {}
    for label in labels.items:
        if (number := number_named(normalise_name(label.key).rpartition("/")[2])) is not None:
            numbers.setdefault(label.video or label.key.rpartition("/")[0], set()).add(number)
    for video, labelled in numbers.items():
        there = index.numbers_of(video)
        if not there or labelled <= there:
            continue
        shifts = [1, -1, min(there) - min(labelled), max(there) - max(labelled)]
        best = max(shifts, key=lambda shift: len({number + shift for number in labelled} & there))
        shifted = {number + best for number in labelled} & there
        if len(shifted) > len(labelled & there):
            missing = min(labelled - there)
            raise ValueError(
                f"{labels.files[0]} names frame {missing}, and there is none; with {best:+d} added to every number, "
                f"{len(shifted):,} of {len(labelled):,} labels find a frame, not {len(labelled & there):,}. What is meant by "
                f"{missing}? If the file whose name ends in {missing + best}, say --number_offset {best}; if the numbers are "
                f"those of the files and {missing} has no file, say --number_offset 0"
            )


def describe_matches(labels: Labels, found_by: Counter[str]) -> list[str]:
    """Examples of which label goes to which file, first and last."""
    tied = [label for label in labels.items if label.frame]
    if not tied:
        return []
    some = tied if len(tied) <= EXAMPLES + 1 else [*tied[:EXAMPLES], tied[-1]]
    examples = [f"{label.key} -> {label.frame.image_id}" for label in some]
    if len(some) < len(tied):
        examples.insert(EXAMPLES, "...")
    how = " and ".join(f"by {how} ({number:,})" for how, number in found_by.most_common())
    return [f"labels find their frames {how}: {', '.join(examples)}"]
