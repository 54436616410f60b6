"""Corpus tables: s3prl's ``len_for_bucket`` CSV files, read and checked."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .audio_files import LONGEST
from .bad_audio import ADVICE, Bad

COLUMNS = ("file_path", "length")
REMAKE = "make tables with: s3prl-ekd lengths AUDIO_FOLDER -o TABLE_FOLDER"


@dataclass(frozen=True)
class Utterance:
    """One row: a path relative to the corpus root, and its length in samples at 16 kHz."""

    path: str
    length: int


def read_table(path: str | Path, bad: list[Bad] | None = None) -> list[Utterance]:
    """Read one table.

    Args:
        path: of the CSV file.
        bad: where it is given, rows of files whose header must be wrong (no samples, or more than a
            day) are put here, and not returned, instead of raised.

    Raises:
        DataError: the file is missing, empty, no UTF-8, lacks a column, or has a row that is not
            valid or comes twice; the message names the line.
    """
    return [row for _, row in _read(Path(path), bad)]


def read_tables(
    folder: str | Path, sets: Sequence[str], bad: list[Bad] | None = None
) -> list[Utterance]:
    """All rows of the tables ``folder/SET.csv``, the longest utterance first.

    Args:
        folder: of the tables.
        sets: names of the tables.
        bad: see :func:`read_table`.

    Raises:
        DataError: see :func:`read_table`; or an utterance is in two of the tables.
    """
    rows: list[Utterance] = []
    seen: dict[str, str] = {}
    for path in (Path(folder) / f"{name}.csv" for name in sets):
        for line, row in _read(path, bad):
            here = f"the corpus table {path}, line {line}"
            there = seen.setdefault(posixpath.normpath(row.path), here)
            if there is not here:
                raise DataError(
                    f"{here}: {_show(row.path)} comes twice, first in {there}; take a table or "
                    "the row out"
                )
            rows.append(row)
    return sorted(rows, key=lambda row: (-row.length, row.path))


def _read(path: Path, bad: list[Bad] | None) -> list[tuple[int, Utterance]]:
    """The rows with their line numbers, which count from 1, the columns' names included."""
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise DataError(f"cannot read the corpus table {path}: it is not a file; {REMAKE}")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read the corpus table {path}: {reason}; {REMAKE}") from None
    try:
        text = data.decode("utf-8-sig")  # spreadsheet programs put a mark before the first column
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"the corpus table {path} is not CSV text: line {line} is not UTF-8; {REMAKE}"
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return _rows(reader, path, bad)
    except csv.Error as error:
        raise DataError(
            f"the corpus table {path} is not CSV text: line {reader.line_num}: {error}; {REMAKE}"
        ) from None


def _rows(reader: Any, path: Path, bad: list[Bad] | None) -> list[tuple[int, Utterance]]:
    names: list[str] = next(reader, [])
    for name in COLUMNS:
        if names.count(name) != 1:
            number = "no" if name not in names else "more than one"
            raise DataError(
                f"the corpus table {path}, line 1, has {number} column {name}; the first line must "
                f"name {' and '.join(COLUMNS)}; {REMAKE}"
            )
    name_at, length_at = (names.index(name) for name in COLUMNS)
    rows: list[tuple[int, Utterance]] = []
    lines: dict[str, int] = {}
    left_out = 0
    for cells in reader:
        if not cells:  # an empty line
            continue
        here = f"the corpus table {path}, line {reader.line_num}"
        if len(cells) != len(names):
            raise DataError(f"{here}, has {len(cells)} cells; the first line names {len(names)}")
        name, length = cells[name_at], cells[length_at]
        row = Utterance(name, _length(name, length, here))
        _check_path(name, here)
        wrong = _wrong_header(row.length)
        if wrong and bad is None:
            raise DataError(f"{here}: {_show(name)} with length {_show(length)} {wrong}; {ADVICE}")
        first = lines.setdefault(posixpath.normpath(name), reader.line_num)
        if first != reader.line_num:
            raise DataError(f"{here}: {_show(name)} comes twice, first in line {first}; leave one")
        if wrong and bad is not None:
            bad.append(Bad(name, "length", f"its table's length {row.length} {wrong}"))
            left_out += 1
        else:
            rows.append((reader.line_num, row))
    if not rows:
        why = ""
        if bad and left_out:
            why = f"that can be used: {_show(bad[-1].path)}: {bad[-1].reason}"
        raise DataError(f"the corpus table {path} has no rows {why}".rstrip() + f"; {REMAKE}")
    return rows


def _length(name: str, text: str, here: str) -> int:
    try:
        length = float(text)  # pandas may have written 16000.0
    except ValueError:
        length = -1.0
    if not name or not 0 <= length < float("inf") or length != int(length):
        raise DataError(
            f"{here}: {_show(name)} with length {_show(text)} is not a path with a positive whole "
            "number of samples"
        )
    return int(length)


def _wrong_header(length: int) -> str:
    """Why a file cannot be of this length, whatever its header said to who made the table."""
    if length == 0:
        return "has no samples"
    if length > LONGEST:
        return "would be longer than a day; lengths are in samples at 16 kHz"
    return ""


def _check_path(name: str, here: str) -> None:
    if "\0" in name:
        raise DataError(f"{here}: the path {_show(name)} has a NUL character in it")
    if name.startswith("/"):
        raise DataError(
            f"{here}: the path {_show(name)} is absolute; it must be relative to libri_root"
        )
    if ".." in name.split("/"):
        raise DataError(
            f"{here}: the path {_show(name)} leads upwards (..); it must stay below libri_root"
        )


def _show(text: str) -> str:
    """In quotes, and not longer than a message can be."""
    shown = repr(text)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
