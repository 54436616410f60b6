"""Read and check length tables, s3prl's ``len_for_bucket`` CSV files.

A row is a file, or a segment of one if the column ``offset`` (ours) has a number.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..files.text import check_regular
from .audio_files import MAX_SAMPLES, AudioPart
from .bad_audio import BAD_AUDIO_ADVICE, BadUtterance

COLUMNS = ("file_path", "length")
OFFSET = (
    "offset"  # optional column: the first sample of a segment, at 16 kHz; empty: the whole file
)
TABLE_ADVICE = "write tables with: s3prl-ekd length-tables AUDIO_FOLDER -o TABLE_FOLDER"


class Utterance(NamedTuple):
    """One row of a length table: a file or a segment of it."""

    path: str  # relative to the corpus root
    length: int  # samples at 16 kHz
    offset: int | None = None  # first sample of a segment; None: the whole file

    @property
    def name(self) -> str:
        """The key of caches and random draws: the path, ``PATH@OFFSET+LENGTH`` for a segment."""
        return str(AudioPart(self.path, self.offset, self.length))

    def part(self, root: str | Path) -> AudioPart:
        """The audio below ``root``."""
        length = None if self.offset is None else self.length
        return AudioPart(Path(root) / self.path, self.offset, length)


def read_table(path: str | Path, bad: list[BadUtterance] | None = None) -> list[Utterance]:
    """Read one table.

    Args:
        bad: list to which rows with an impossible length (no samples, or more than a day) are
            added instead of being returned; if None, such a row is an error.

    Raises:
        DataError: the file is missing, empty or not UTF-8, a column is missing, or a row is invalid
            or repeated. The message has the line number.
    """
    return [row for _, row in _read(Path(path), bad)]


def read_tables(
    folder: str | Path, sets: Sequence[str], bad: list[BadUtterance] | None = None
) -> list[Utterance]:
    """Read the tables ``folder/SET.csv`` and sort all rows, the longest utterance first.

    Raises:
        DataError: as :func:`read_table`, or an utterance is in two of the tables.
    """
    rows: list[Utterance] = []
    locations: dict[str, str] = {}
    for path in (Path(folder) / f"{name}.csv" for name in sets):
        for line, row in _read(path, bad):
            location = f"{path}: line {line}"
            previous = locations.setdefault(posixpath.normpath(row.name), location)
            if previous is not location:
                raise DataError(
                    f"{location}: {_quote(row.name)} is also in {previous}; remove one of the "
                    "rows or tables"
                )
            rows.append(row)
    return sorted(rows, key=sort_key)


def sort_key(row: Utterance) -> tuple[int, str, int]:
    """Sort key of utterances: the longest first, then by path and offset."""
    return -row.length, row.path, row.offset or 0


def _read(path: Path, bad: list[BadUtterance] | None) -> list[tuple[int, Utterance]]:
    """Return the rows with their line numbers; the header is line 1."""
    try:
        check_regular(path, "length table", DataError)
        data = path.read_bytes()
        text = data.decode("utf-8-sig")  # -sig: spreadsheet programs write a BOM
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problem = f"cannot read the length table {path}: line {line} is not UTF-8"
    except OSError as error:
        problem = f"cannot read the length table {path}: {error.strerror}"
    except DataError as error:
        problem = str(error)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            return _rows(reader, path, bad)
        except csv.Error as error:
            line = reader.line_num
            problem = f"cannot read the length table {path}: line {line} is not CSV ({error})"
    raise DataError(f"{problem}; {TABLE_ADVICE}")


def _rows(reader: Any, path: Path, bad: list[BadUtterance] | None) -> list[tuple[int, Utterance]]:
    header: list[str] = next(reader, [])
    for column in COLUMNS:
        if header.count(column) != 1:
            raise DataError(
                f"{path}: line 1 must be a header with the columns {' and '.join(COLUMNS)}; it has "
                f"the column {column} {header.count(column)} times; {TABLE_ADVICE}"
            )
    if header.count(OFFSET) > 1:
        raise DataError(f"{path}: line 1 has the column {OFFSET} {header.count(OFFSET)} times")
    rows: list[tuple[int, Utterance]] = []
    lines: dict[str, int] = {}
    left_out = ""
    for cells in reader:
        if not cells:  # an empty line
            continue
        location = f"{path}: line {reader.line_num}"
        if len(cells) != len(header):
            raise DataError(f"{location}: expected {len(header)} cells, got {len(cells)}")
        name, length = (cells[header.index(column)] for column in COLUMNS)
        offset = cells[header.index(OFFSET)] if OFFSET in header else ""
        row = _utterance(name, length, offset, location)
        first_line = lines.setdefault(posixpath.normpath(row.name), reader.line_num)
        if first_line != reader.line_num:
            raise DataError(
                f"{location}: {_quote(row.name)} is also in line {first_line}; remove one of the "
                "rows"
            )
        if 0 < row.length <= MAX_SAMPLES:
            rows.append((reader.line_num, row))
            continue
        # Tables are made from headers, which may be wrong.
        problem = "has no samples"
        if row.length:
            problem = "would be longer than a day; lengths are in samples at 16 kHz"
        if bad is None:
            raise DataError(
                f"{location}: {_quote(name)} with length {_quote(length)} {problem}; "
                f"{BAD_AUDIO_ADVICE}"
            )
        bad.append(BadUtterance(row.name, "length", f"its table's length {row.length} {problem}"))
        left_out = f" usable rows (e.g. {_quote(name)}: {bad[-1].reason})"
    if not rows:
        raise DataError(f"{path}: the table has no{left_out or ' rows'}; {TABLE_ADVICE}")
    return rows


def _utterance(name: str, length_text: str, offset_text: str, location: str) -> Utterance:
    length, offset = _samples(length_text), _samples(offset_text)
    if not name or length is None:
        raise DataError(
            f"{location}: expected a path and its length as a whole number of samples, got "
            f"{_quote(name)} and {_quote(length_text)}"
        )
    if offset is None and offset_text.strip():
        raise DataError(
            f"{location}: {OFFSET} must be empty or the first sample of a segment, a whole number, "
            f"got {_quote(offset_text)}"
        )
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise DataError(
            f"{location}: the path must be below libri_root, without .. and NUL, got {_quote(name)}"
        )
    return Utterance(name, length, offset)


def _samples(text: str) -> int | None:
    """A number of samples; None if the text is none."""
    try:
        number = float(text)  # pandas may have written 16000.0
    except ValueError:
        return None
    return int(number) if 0 <= number < float("inf") and number == int(number) else None


def _quote(text: str) -> str:
    """Quote a text for a message, shortened to 200 characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:197]}..."
