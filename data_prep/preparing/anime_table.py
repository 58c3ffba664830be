"""A table of anime, of whichever year and maker: which column says what, and what its cells mean.

Known are the MyAnimeList tables of 2016 to 2025 and others that name their columns alike. A cell may hold one text, names
set apart by commas, or a list of Python or JSON; unknown values are written in many ways and never become text.
"""

import ast
import csv
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from preparing.ledger import Ledger
from preparing.tables import SEPARATORS, read_table

# What a column may be called, best name first: in lower case, without spaces and marks.
ROLES = {
    "anime_id": ("animeid", "malid", "myanimelistid", "maid", "id", "uid", "anilistid"),
    "title": ("name", "title", "animename", "animetitle", "titleromaji", "romaji", "titledefault", "romajititle", "titlename",
              "제목", "작품명"),
    "english_name": ("englishname", "titleenglish", "english", "englishtitle", "nameenglish", "영어제목"),
    "other_name": ("othername", "japanesename", "titlejapanese", "japanese", "japanesetitle", "namejapanese", "titlenative",
                   "nativename", "native", "원제"),
    "genres": ("genres", "genre", "genreslist", "장르"),
    "synopsis": ("synopsis", "sypnopsis", "synopses", "description", "summary", "plot", "overview", "story", "줄거리"),
    "episodes": ("episodes", "episode", "numepisodes", "episodecount", "numberofepisodes", "totalepisodes", "eps", "화수"),
    "producers": ("producers", "producer", "제작사"),
    "studios": ("studios", "studio", "animationstudio", "스튜디오"),
    "rating": ("rating", "agerating", "contentrating", "ageclassification", "관람등급"),
    "score": ("score", "malscore", "meanscore", "averagescore", "avgscore", "weightedscore", "userrating", "averagerating",
              "평점"),
    "scored_by": ("scoredby", "numscoringusers", "scoringusers", "numberofvotes", "numvotes", "votes", "scoredbyusers",
                  "ratingcount", "numratings"),
}  # fmt: skip
TEXTS, NUMBERS = ("title", "english_name", "other_name"), ("anime_id", "episodes", "score", "scored_by")
LISTS = ("genres", "producers", "studios")
FACTS = ("genres", "synopsis", "episodes", "producers", "studios", "rating", "score", "scored_by")

# How people and programs write "nobody knows"; compared without case. A score or a count of 0 says the same.
NO_VALUE = {"", "nan", "null", "nil", "n/a", "na", "#n/a", "<na>", r"\n", "(null)", "[]", "{}", "nat", "undefined"}
MISSING = NO_VALUE | {
    "unknown", "none", "none found", "none found, add some", "add some", "missing", "-", "--", "---", "–", "—", "?", "??", "???",
    ".", "...", "tba", "tbd", "tbc", "to be announced", "to be determined", "not available", "not yet aired", "not found",
    "not specified", "unspecified", "unrated", "not rated", "not yet rated", "no data", "no info", "no information", "no genres",
    "no genre", "no studio", "no producers", "no rating", "no score", "[none]", "(none)", "[null]", "[nan]", "#ref!", "#value!",
    "#name?", "#div/0!", "없음", "미정", "미상", "알 수 없음", "정보 없음", "불명", "不明", "未定", "未知",
    "n.a", "unk", "unavailable", "not applicable", "n/d", "n.d", "nd", "no value", "nodata", "no-data", "none listed", "none given",
    "no studios", "no licensors", "missing value", "unknown rating", "to be decided", "pending", "blank", "#n/a n/a", "-nan",
    "1.#qnan", "n\\a", "∅", "해당 없음", "해당없음", "모름", "미등록", "정보없음", "데이터 없음", "알수없음", "未发表", "未公開", "未公开", "なし", "无",
}  # fmt: skip
NO_SYNOPSIS = re.compile(
    r"(there is |sorry,? )?(currently )?no (description|synopsis|summary|plot|overview|story|background)\b"
    r"|(the |a )?(description|synopsis|summary|plot|overview) (is |has )?(currently )?"
    r"(not |un)(been )?(yet )?(available|known|added|written|found)"
    r"|(description|synopsis|summary|plot)( is| will be)? (coming soon|to be (announced|added)|tb[ad])",
    re.IGNORECASE,
)
CREDIT = re.compile(r"\s*[(\[](source|written by)\b[^)\]]*[)\]]", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z]\w*);", re.IGNORECASE)
TAG = re.compile(
    r"<(script|style)\b[^<>]*>.*?</\1>"
    r"|</?(?:br|p|i|b|u|s|em|strong|a|div|span|ul|ol|li|small|sup|sub|font|hr|h\d|blockquote|img|center|strike|del|ins|mark|cite|q"
    r"|code|tt|pre|ruby|rb|rt|rp|table|thead|tbody|tr|td|th|dl|dt|dd|section|article|details|summary|abbr|big|label|iframe|wbr)"
    r"(?:\s[^<>]*)?/?>"
    r"|\[/?(?:i|b|u|s|url|img|spoiler|quote|center|size|color|list|\*|yt|right|left|code)(?:=[^\[\]]*)?\]|~!|!~|<!--.*?-->",
    re.IGNORECASE | re.DOTALL,
)
# Zero-width and steering characters, soft hyphens, a byte order mark inside text. Joiners of emoji stay.
INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
_emoji = "\u2600-\u27bf\U0001f000-\U0001faff"
LONE_JOINER = re.compile(f"(?<![{_emoji}\ufe0f])\u200d|\u200d(?![{_emoji}])")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
COMPANY_FORMS = re.compile(r"(inc|ltd|llc|corp|co|gmbh|s\.a|k\.k)\.?", re.IGNORECASE)
OPENS_LIST = re.compile(r"[\[{]|\(\s*['\"]|(?:array|list|set|tuple)\(")
HIGHEST_SCORE = 10
FEWEST_SCORES = 20  # fewer do not tell the scale


def is_missing(text: str) -> bool:
    """Whether a cell says that nobody knows: a mark of MISSING in any case, brackets or quotes, once or in a list."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    if plain in MISSING or not re.search(r"\w", plain.replace("_", "")):
        return True
    pieces = [re.sub(r"^[\s\"'<(\[{]+|[\s\"'>)\]}.]+$", "", piece) for piece in re.split("[,;|]", plain)]
    return all(piece in MISSING for piece in pieces)


class Title(NamedTuple):
    """One row of the table. Unknown text is "", unknown lists are empty, unknown numbers are None."""

    line: int
    anime_id: int
    title: str  # what questions call it: the English name, or the name where that is unknown or shared
    name: str
    english_name: str
    other_name: str
    synopsis: str
    genres: list[str]
    producers: list[str]
    studios: list[str]
    episodes: int | None
    rating: str
    score: float | None
    scored_by: int | None


@dataclass
class AnimeTable:
    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]
    columns: dict[str, str]  # which column says what
    notes: list[str] = field(default_factory=list)  # how the table was understood, for people
    separators: dict[str, str] = field(default_factory=dict)  # between the names of a cell, where it is no comma

    def describe(self) -> list[str]:
        """Lines for people: which column says what, which are not used, and what was noticed."""
        said = ", ".join(f"{role} = {name}" for role, name in self.columns.items())
        unused = [name for name in self.header if name not in self.columns.values()]
        return [f"columns: {said}", f"not used: {', '.join(unused) or 'none'}", *self.notes]


def open_table(path: Path, wanted: str | None = None) -> AnimeTable:
    """The table with its columns understood. `wanted` is "title=Name,score=" and overrides what would be guessed.

    Raises ValueError when the file is not there or is no CSV, and when it has no title or no fact.
    """
    try:
        table = read_table(path)
    except OSError as error:
        raise ValueError(f"--csv {path}: cannot be read ({error.strerror})") from None
    opened = AnimeTable(path, table.header, table.rows, {})
    if repeated := [name for name, number in Counter(table.header).items() if number > 1 and name]:
        raise ValueError(f"{path}: several columns are called {', '.join(repeated)}: give each a name of its own")
    chosen = parse_columns(wanted, table.header) if wanted else {}
    guess_columns(opened, chosen)
    facts = [role for role in FACTS if role in opened.columns]
    if not (facts and any(role in opened.columns for role in TEXTS)):
        said = "; ".join(opened.describe()[:1] + opened.notes) if opened.columns else "no column is known"
        raise ValueError(
            f"{path}: missing columns: needed are a title and at least one of {', '.join(FACTS)}\n"
            f"found: {', '.join(table.header) or 'nothing'} ({said})\n"
            "Say which column is which: --columns title=Name,score=Rating"
        )
    if table.separator != ",":
        opened.notes.append(f"cells are set apart by a {SEPARATORS.get(table.separator, table.separator)}")
    return opened


def parse_columns(wanted: str, header: list[str]) -> dict[str, str]:
    """{role: column, or "" to leave it out} of "title=Name,score=". ValueError lists every mistake."""
    chosen: dict[str, str] = {}
    problems = []
    for pair in wanted.split(","):
        role, equals, name = (part.strip() for part in pair.partition("="))
        if not equals or role not in ROLES:
            problems.append(f"{pair.strip()!r}: expected {'|'.join(ROLES)} = the name of a column")
        elif role in chosen:
            problems.append(f"{role} is given twice")
        elif name and name not in header:
            problems.append(f"{role}={name}: the table has the columns {', '.join(header)}")
        chosen[role] = name
    if problems:
        raise ValueError("--columns: " + "\n--columns: ".join(problems))
    return chosen


def guess_columns(table: AnimeTable, chosen: dict[str, str]) -> None:
    """Fills in `columns` by the names in the header and by what the cells hold."""
    plain = {re.sub(r"[\W_]+", "", unicodedata.normalize("NFC", name).casefold()): name for name in table.header}
    taken = {name for name in chosen.values() if name}
    for role, names in ROLES.items():
        if role in chosen:
            found = chosen[role]
        else:
            found = next((plain[name] for name in names if name in plain and plain[name] not in taken), "")
        if found:
            table.columns[role] = found
            taken.add(found)
    if "score" not in table.columns and "score" not in chosen and "rating" not in chosen:
        rating = table.columns.get("rating")
        if rating and share_of_numbers(known_cells(table, rating)) > 0.5:
            table.columns["score"] = table.columns.pop("rating")
            table.notes.append(f"the column {rating!r} holds numbers: it is the score, not the age rating")
    check_score(table, explicit=bool(chosen.get("score")))
    ids = table.columns.get("anime_id")
    if ids and "anime_id" not in chosen and share_of_numbers(known_cells(table, ids)) < 0.5:
        del table.columns["anime_id"]
    if "anime_id" not in table.columns:
        table.notes.append("no column of numbers names the anime: anime_id is the line of the table")
    for role in LISTS:
        if role in table.columns:
            cells = known_cells(table, table.columns[role])
            marks = [mark for mark in "|;" if any(mark in cell for cell in cells)]
            if len(marks) == 1 and not any("," in cell or cell[:1] in "[{" for cell in cells):
                table.separators[role] = marks[0]


def check_score(table: AnimeTable, *, explicit: bool) -> None:
    """Leaves out a score that was only guessed and is not out of 10, as answers say."""
    column = table.columns.get("score")
    if column is None or explicit:
        return
    numbers = [number for cell in known_cells(table, column) if (number := to_number(cell)) is not None]
    highest = max(numbers, default=0)
    if highest > HIGHEST_SCORE or (0 < highest <= HIGHEST_SCORE / 2 and len(numbers) >= FEWEST_SCORES):
        if sum(number > HIGHEST_SCORE for number in numbers) * 10 < len(numbers) and highest > HIGHEST_SCORE:
            return  # single mistakes: they are rejected row by row
        del table.columns["score"]
        table.notes.append(
            f"the column {column!r} goes up to {highest:g}, so it is not out of 10, as the answers say: left out. "
            f"--columns score={column} takes it as out of 10"
        )


def known_cells(table: AnimeTable, column: str) -> list[str]:
    """Cells of a column that say something."""
    place = table.header.index(column)
    cells = [cells[place] for _, cells in table.rows if len(cells) == len(table.header)]
    return [cell for cell in cells if not is_missing(cell)]


def share_of_numbers(cells: list[str]) -> float:
    """Share of the cells that are numbers, 0 to 1."""
    return sum(to_number(cell) is not None for cell in cells) / len(cells) if cells else 0.0


def read_titles(table: AnimeTable, ledger: Ledger) -> list[Title]:
    """Every row that can be used; the others go to the ledger under "titles"."""
    path = table.path
    titles: dict[int, Title] = {}
    lines_by_name: dict[str, int] = {}
    for line, cells in tqdm(table.rows, desc="reading titles", unit="row"):
        ledger.read("titles")
        if len(cells) != len(table.header):
            detail = f"{len(cells)} cells where the header has {len(table.header)}: a quote or a comma is out of place"
            ledger.reject("titles", path, line, "wrong_number_of_cells", detail)
            continue
        row = dict(zip(table.header, cells, strict=True))
        try:
            title = clean_row(row, line, table)
        except ValueError as error:
            ledger.reject("titles", path, line, "bad_value", str(error))
            continue
        name = title.name.casefold()
        if title.anime_id in titles:
            first = titles[title.anime_id]
            if added := add_lists(first, title):
                titles[title.anime_id] = added
                detail = (
                    f"it adds to the lists of anime_id {title.anime_id} in line {first.line}, and says the same else"
                )
                ledger.reject("titles", path, line, "row_of_same_title", detail)
                continue
            detail = f"anime_id {title.anime_id} stands in line {first.line} already, which is kept"
            ledger.reject("titles", path, line, "duplicate_id", detail)
        elif name in lines_by_name:
            detail = f"{title.name!r} stands in line {lines_by_name[name]} already: asked for it, which one is meant?"
            ledger.reject("titles", path, line, "ambiguous_name", detail)
        else:
            ledger.accept("titles")
            titles[title.anime_id] = title
            lines_by_name[name] = line
    sharers = Counter(
        name for title in titles.values() for name in {title.name.casefold(), title.english_name.casefold()}
    )
    return [
        title._replace(title=title.name) if sharers[title.title.casefold()] > 1 else title for title in titles.values()
    ]


def add_lists(first: Title, again: Title) -> Title | None:
    """Both rows as one, where they differ in lists alone, as tables with one row per genre do; None otherwise."""
    alike = {role: getattr(first, role) for role in LISTS} | {"line": first.line}
    if again._replace(**alike) != first:
        return None
    lists = {role: list(dict.fromkeys([*getattr(first, role), *getattr(again, role)])) for role in LISTS}
    added = first._replace(**lists)
    return None if added == first else added


def clean_row(row: dict[str, str], line: int, table: AnimeTable) -> Title:
    """The title of one row. Raises ValueError naming every value of the row that cannot be what its column says."""
    cells = dict.fromkeys(ROLES, "")
    cells |= {role: clean_text(row[name], is_prose=role == "synopsis") for role, name in table.columns.items()}
    name = cells["title"]  # "Unknown" may be the name of something; everywhere else it means that nobody knows
    name = "" if name.casefold() in NO_VALUE else first_of_list(name)
    cells = {role: "" if is_missing(text) else text for role, text in cells.items()}
    english, other = first_of_list(cells["english_name"]), first_of_list(cells["other_name"])
    name = name or english or other
    problems = [] if name else ["it has no title"]
    numbers: dict[str, float] = {}
    for role in NUMBERS:
        column = table.columns.get(role, role)
        number = to_number(cells[role]) if cells[role] else 0.0
        if number is None:
            problems.append(f"{column} {cells[role]!r} is not a number")
            continue
        numbers[role] = number
        if role == "score" and not 0 <= number <= HIGHEST_SCORE:
            problems.append(f"{column} {cells[role]} is not between 0 and 10")
        if role != "score" and not (number >= 0 and number.is_integer()):
            problems.append(f"{column} {cells[role]} is not a whole number of 0 or more")
    if "anime_id" in table.columns and not cells["anime_id"]:
        problems.append(f"{table.columns['anime_id']} is empty")
    lists: dict[str, list[str]] = {}
    for role in LISTS:
        try:
            lists[role] = split_names(cells[role], table.separators.get(role, ","))
        except ValueError as error:
            problems.append(f"{table.columns[role]}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return Title(
        line=line,
        anime_id=int(numbers["anime_id"]) if "anime_id" in table.columns else line,
        title=english or name,
        name=name,
        english_name=english or name,
        other_name=other,
        synopsis=clean_synopsis(cells["synopsis"]),
        episodes=int(numbers["episodes"]) or None,
        rating=cells["rating"],
        score=numbers["score"] or None,
        scored_by=int(numbers["scored_by"]) or None,
        **lists,
    )


def clean_text(text: str, *, is_prose: bool) -> str:
    """NFC on one line, entities as characters, without invisible characters; prose also without tags."""
    for _ in range(2 if "&" in text else 0):  # some tables were escaped twice
        text = ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if is_prose:
        text = TAG.sub(" ", text)
    if not text.isascii():
        text = LONE_JOINER.sub("", INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    text = CONTROL.sub(" ", text)
    text = " ".join(text.split())
    return re.sub(r" (?=[.,;:!?](?:\s|$))", "", text) if is_prose else text


def clean_synopsis(text: str) -> str:
    """Without credits such as "(Source: ANN)" or "[Written by MAL Rewrite]"; "" for the site's "No synopsis …"."""
    return "" if NO_SYNOPSIS.match(text) else CREDIT.sub("", text).strip()


def to_number(text: str) -> float | None:
    """The number of a cell: 12, 12.0, 914,193, "24 eps", "8.75/10"; None where it is none."""
    text = re.sub(r"\s*(eps?\.?|episodes?|users?|votes?|화|편|명)$|\s*/\s*10$", "", text.strip(), flags=re.IGNORECASE)
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.0*)?", text, re.ASCII):
        text = text.replace(",", "")
    return float(text) if re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)(e\+?\d{1,2})?", text, re.IGNORECASE | re.ASCII) else None


def split_names(text: str, separator: str) -> list[str]:
    """The names of a cell: set apart by `separator`, or a list of Python or JSON. Raises ValueError for a broken list."""
    names: list[str] = []
    for name in names_in(parse_list(text)) if OPENS_LIST.match(text) else text.strip('"').split(separator):
        name = clean_text(name, is_prose=False)
        if names and COMPANY_FORMS.fullmatch(name):
            names[-1] += f", {name}"  # "Foo Co., Ltd." is one company
        elif not is_missing(name):
            names.append(name)
    return list(dict.fromkeys(names))


def parse_list(text: str) -> Any:
    """A list written as JSON, as Python, numpy or Postgres write it, or names without quotes. Raises ValueError for others."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    text = re.sub(r"^(?:array|list|set|tuple)\((.*?)(?:,\s*dtype=\w+)?\)$", r"\1", text)
    inside = text[1:-1]
    if (text[0], text[-1]) == ("{", "}") and ":" not in inside:
        # A set of Python has no order of its own, and Postgres writes lists so, with quotes where a name needs them.
        if "'" not in inside:
            return next(csv.reader([inside], skipinitialspace=True), [])
        text = f"[{inside}]"
    if (text[0], text[-1]) == ("[", "]") and not re.search(r"[\[\]{}()\"':]", inside):
        return inside.split(",")
    # numpy sets names apart by spaces, which Python would join to one.
    text = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", text)
    try:
        return ast.literal_eval(re.sub(r"\bnan\b", "None", text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{text!r:.60} opens a list that does not close, or is none of Python or JSON") from None


def names_in(value: Any) -> Iterable[str]:
    """Every name in a list of names or of objects that have one: [{"mal_id": 1, "name": "Bar"}], {"nodes": [...]}."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        inner = next((value[key] for key in ("name", "nodes", "edges", "node", "title", "genre") if key in value), None)
        if inner is None and value:
            raise ValueError(f"{value!r:.60} has no name")
        yield from names_in(inner)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from names_in(entry)
    elif value is not None and value == value:
        raise ValueError(f"{value!r:.40} is no name")


def first_of_list(text: str) -> str:
    """A title from a cell that holds a list of them; the text itself where it is none, as "[C]" is."""
    if not re.fullmatch(r"\[\s*[\"'].*[\"']\s*\]", text):
        return text
    try:
        return clean_text(next(iter(names_in(parse_list(text))), ""), is_prose=False)
    except ValueError:
        return text
