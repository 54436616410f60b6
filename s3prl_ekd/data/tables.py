"""Corpus tables: s3prl's ``len_for_bucket`` CSV files, read and checked."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

COLUMNS = ("file_path", "length")


@dataclass(frozen=True)
class Utterance:
    """One row: a path relative to the corpus root, and its length in samples at 16 kHz."""

    path: str
    length: int


def read_table(path: str | Path) -> list[Utterance]:
    """Read one table.

    Raises:
        DataError: the file is missing, empty, lacks a column, or has a row that is not valid; the
            message names the line.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return _rows(csv.DictReader(file), path)
    except OSError as error:
        raise DataError(
            f"cannot read the corpus table {path}: {error.strerror}; "
            "make tables with: s3prl-ekd lengths AUDIO_FOLDER -o TABLE_FOLDER"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the corpus table {path} is not CSV text: {error}") from None


def _rows(reader: csv.DictReader, path: Path) -> list[Utterance]:
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(
            f"the corpus table {path} has no column {missing[0]}; the first line must name "
            f"{' and '.join(COLUMNS)}"
        )
    rows = []
    for row in reader:
        name, text = row["file_path"], row["length"]
        try:
            length = float(text)  # pandas may have written 16000.0
        except (TypeError, ValueError):
            length = 0.0
        if not name or not 0 < length < 2**40 or length != int(length):
            raise DataError(
                f"the corpus table {path}, line {reader.line_num}: {name!r} with length {text!r} "
                "is not a path with a positive whole number of samples"
            )
        rows.append(Utterance(name, int(length)))
    if not rows:
        raise DataError(f"the corpus table {path} has no rows")
    return rows


def read_tables(folder: str | Path, sets: Sequence[str]) -> list[Utterance]:
    """All rows of the tables ``folder/SET.csv``, the longest utterance first.

    Raises:
        DataError: see :func:`read_table`.
    """
    rows = [row for name in sets for row in read_table(Path(folder) / f"{name}.csv")]
    return sorted(rows, key=lambda row: (-row.length, row.path))
