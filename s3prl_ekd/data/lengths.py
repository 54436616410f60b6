"""Write length tables: the CSV files in s3prl's ``len_for_bucket`` folders.

The columns are an unnamed index, ``file_path``, ``length`` in samples at 16 kHz, and ``label``,
which is empty. The longest utterance comes first. s3prl's script for this,
``preprocess/generate_len_for_bucket.py``, gives the same numbers, but it is not in s3prl's PyPI
package, is interactive and supports three corpora only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, printable
from ..files.atomic import make_folder, write_csv, write_text
from .audio_files import find_audio, read_headers, total_hours

SKIPPED = "skipped.txt"
_SPLIT_NAME = re.compile(r"(train|dev|test|valid)", re.IGNORECASE)

LengthRow = tuple[str, int]  # file_path, length in samples at 16 kHz


@dataclass(frozen=True)
class LengthTables:
    """The result of :func:`write_length_tables`."""

    rows: dict[str, list[LengthRow]]  # table name -> rows, longest first
    skipped: list[tuple[str, str]]  # (file_path, reason) of the files in no table
    why_single: str | None  # see group_by_split

    def summary(self) -> str:
        """Utterances and hours of each table, and the files left out, as text."""
        tables = {f"{printable(name)}.csv": rows for name, rows in self.rows.items()}
        tables["total"] = [row for rows in self.rows.values() for row in rows]
        lines = [
            f"{name}: {len(rows)} utterances, {total_hours(n for _, n in rows):.2f} h"
            for name, rows in tables.items()
        ]
        if self.why_single:
            lines.append(f"wrote a single table because {printable(self.why_single)}")
        if self.skipped:
            names = ", ".join(printable(path) for path, _ in self.skipped[:3])
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"left out {len(self.skipped)} files ({names}{more}); see {SKIPPED}")
        return "\n".join(lines)


def sort_rows(rows: Iterable[LengthRow]) -> list[LengthRow]:
    """Sort by length, longest first, then by path, so that the order is reproducible."""
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def write_table(path: str | Path, rows: Iterable[LengthRow]) -> None:
    """Write one table, in the order of :func:`sort_rows`; the write is atomic."""
    head = ("", "file_path", "length", "label")
    numbered = ((i, name, length, "") for i, (name, length) in enumerate(sort_rows(rows)))
    write_csv(path, (head, *numbered), line_end="\n")


def group_by_split(
    root: Path, paths: Sequence[str], *, name: str | None = None, single: bool = False
) -> tuple[dict[str, list[str]], str | None]:
    """Group files into tables, one for each split if possible.

    There is one table for each first-level folder if every file is in a folder with the name of a
    split (``train-clean-100``, ``dev``, ``TEST``). Otherwise there is a single table with the name
    ``name`` or the name of ``root``.

    Returns:
        The paths in each table, and the reason for a single table if it was not requested.
    """
    table = name or root.resolve().name or "all"
    if single or name:
        return {table: list(paths)}, None
    groups: dict[str, list[str]] = {}
    for path in paths:
        split, slash, _ = path.partition("/")
        if not slash:
            return {table: list(paths)}, f"{path} is directly in {root}, not in a split's folder"
        if not _SPLIT_NAME.match(split):
            reason = f"the name {split}/ does not start with train, dev, test or valid"
            return {table: list(paths)}, reason
        groups.setdefault(split, []).append(path)
    return groups, None


def write_length_tables(
    root: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    single: bool = False,
    jobs: int = 8,
    bar: bool = False,
) -> LengthTables:
    """Write length tables for all audio files below ``root`` into the folder ``out``.

    Unusable files and the reasons are listed in ``out/skipped.txt``.

    Args:
        name: write a single table with this name.
        single: write a single table even if the folders have names of splits.
        jobs, bar: see :func:`read_headers`.

    Raises:
        DataError: no such folder, no audio, or a table would have no rows.
    """
    root, out = Path(root), Path(out)
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise DataError(f"--name must be a file name without a folder, got {name!r}")
    paths = find_audio(root)
    if not paths:
        raise DataError(f"no audio files (.flac .wav .ogg .opus) below {root}")
    groups, why_single = group_by_split(root, paths, name=name, single=single)
    headers = read_headers(root, paths, jobs=jobs, bar=bar)
    skipped: list[tuple[str, str]] = []
    samples: dict[str, int] = {}
    for path, header in zip(paths, headers, strict=True):
        if isinstance(header, DataError):
            skipped.append((path, str(header)))
        else:
            samples[path] = header.samples
    rows = {
        table: sort_rows((path, samples[path]) for path in members if path in samples)
        for table, members in groups.items()
    }
    make_folder(out)
    (out / SKIPPED).unlink(missing_ok=True)  # it may be of an earlier run
    if skipped:
        lines = [f"{ascii(path)[1:-1]}\t{printable(reason)}\n" for path, reason in skipped]
        write_text(out / SKIPPED, "".join(lines))
    for table, members in rows.items():
        if not members:
            raise DataError(f"no usable file for the table {table}; see {out / SKIPPED}")
    for table, members in rows.items():
        write_table(out / f"{table}.csv", members)
    return LengthTables(rows, skipped, why_single)
