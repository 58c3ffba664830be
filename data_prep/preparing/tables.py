"""Tables as spreadsheets and exports write them: commas, semicolons or tabs, UTF-8 or CP949, quoted line breaks."""

import csv
import io
import unicodedata
from pathlib import Path
from typing import NamedTuple

from preparing.text_files import read_text

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# First bytes of files that are often given in place of a table, and what to do with each.
NO_TABLES = {
    b"PK\x03\x04": "an Excel workbook or another ZIP archive: in Excel choose File, Save As, CSV UTF-8; unpack an archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls): in Excel choose File, Save As, CSV UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it first (gunzip)",
    b"PAR1": "a Parquet file: pandas.read_parquet(file).to_csv(new_file, index=False) writes it as CSV",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"%PDF": "a PDF: export the table as CSV",
}
MAX_CELL = 2**31 - 1  # the csv module's own limit is 128 KiB


class Table(NamedTuple):
    header: list[str]
    rows: list[tuple[int, list[str]]]  # (line on which the row starts, cells), blank lines left out
    separator: str


def refuse_other_kinds(path: Path) -> None:
    """Raises ValueError that names the kind and the remedy when `path` is a workbook, an archive or a database."""
    with path.open("rb") as file:
        start = file.read(16)
    for magic, kind in NO_TABLES.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {kind}")


def read_table(path: Path) -> Table:
    """The table with its cells stripped of surrounding space. ValueError names file and line where it is no CSV."""
    refuse_other_kinds(path)
    text = read_text(path)
    lines_before = 0
    first, _, rest = text.partition("\n")
    separator = ""
    if first.strip().strip('"').casefold().startswith("sep=") and len(first.strip().strip('"')) <= 5:
        # Excel's own note on the separator. A tab behind it is stripped with the space around it.
        separator, text, lines_before = first.strip().strip('"')[4:] or "\t", rest, 1
    separator = separator or guess_separator(text)
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    rows = []
    line = 1
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                rows.append((line + lines_before, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line + lines_before} is not CSV: {error}") from error
    header = [unicodedata.normalize("NFC", name) for name in rows[0][1]] if rows else []  # as templates name columns
    return Table(header, rows[1:], separator)


def guess_separator(text: str) -> str:
    """The separator that the first line that is not blank holds most often outside quotes; a comma when it holds none."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    outside = "".join(header.split('"')[::2])
    return max(SEPARATORS, key=lambda separator: (outside.count(separator), separator == ","))
