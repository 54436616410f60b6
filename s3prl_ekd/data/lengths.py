"""Length tables: the CSV files that s3prl reads from its ``len_for_bucket`` folders.

A table has the columns (unnamed index), ``file_path``, ``length`` in samples at 16 kHz and an
empty ``label``; the longest utterance comes first. s3prl makes them with
``preprocess/generate_len_for_bucket.py``, which its PyPI package lacks, which asks questions and
which knows three corpora; the tables here hold the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, printable
from ..files.atomic import make_folder, write_csv, write_text
from .audio_files import find_audio, read_headers, total_hours

SKIPPED = "skipped.txt"
_SPLIT_NAME = re.compile(r"(train|dev|test|valid)", re.IGNORECASE)

Row = tuple[str, int]  # file_path, length in samples at 16 kHz


@dataclass(frozen=True)
class LengthTables:
    """What :func:`write_length_tables` wrote."""

    rows: dict[str, list[Row]]  # table name -> rows, longest first
    skipped: list[tuple[str, str]]  # (file_path, why it is in no table)
    why_single: str | None  # why there is one table and not one a split, if nobody asked for it

    def summary(self) -> str:
        """Lines for the screen: utterances and hours of each table, then what was left out."""
        lines = [
            f"{name}.csv: {len(rows)} utterances, {total_hours(n for _, n in rows):.2f} h"
            for name, rows in zip(map(printable, self.rows), self.rows.values(), strict=True)
        ]
        every = [row for rows in self.rows.values() for row in rows]
        lines.append(f"total: {len(every)} utterances, {total_hours(n for _, n in every):.2f} h")
        if self.why_single:
            lines.append(f"one table, because {printable(self.why_single)}")
        if self.skipped:
            names = ", ".join(printable(path) for path, _ in self.skipped[:3])
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"left out: {len(self.skipped)} ({names}{more}); why: {SKIPPED}")
        return "\n".join(lines)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Longest first, equal lengths by path, so that two runs write the same bytes."""
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def write_table(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one table as :func:`sort_rows` orders it; a reader never sees half a file."""
    head = ("", "file_path", "length", "label")
    numbered = ((i, name, length, "") for i, (name, length) in enumerate(sort_rows(rows)))
    write_csv(path, (head, *numbered), line_end="\n")


def group_by_split(
    root: Path, paths: Sequence[str], *, name: str | None = None, single: bool = False
) -> tuple[dict[str, list[str]], str | None]:
    """Which files go into which table, and why there is only one although nobody asked for it.

    One table a first-level folder where every file lies in a folder that is called like a split
    (``train-clean-100``, ``dev``, ``TEST``); else one table called ``name`` or like ``root``.
    """
    whole = name or root.resolve().name or "all"
    if single or name:
        return {whole: list(paths)}, None
    groups: dict[str, list[str]] = {}
    for path in paths:
        split, slash, _ = path.partition("/")
        if not slash:
            return {whole: list(paths)}, f"{path} lies directly in {root}"
        if not _SPLIT_NAME.match(split):
            return {whole: list(paths)}, f"{split}/ is not called train…, dev…, test… or valid…"
        groups.setdefault(split, []).append(path)
    return groups, None


def write_length_tables(
    root: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    single: bool = False,
    jobs: int = 8,
    progress: Callable[[int], Callable[[int], object]] = lambda total: lambda done: None,
) -> LengthTables:
    """Write the tables of every audio file below ``root`` into the folder ``out``.

    Files that cannot be read are named with their reasons in ``out/skipped.txt``.

    Args:
        root: folder of audio; ``file_path`` is relative to it.
        out: folder of the tables, made if it is not there.
        name: write one table of this name.
        single: write one table even where the folders look like splits.
        jobs: threads that read headers.
        progress: given the number of files, returns the ``advance`` of :func:`read_headers`.

    Raises:
        DataError: no such folder, no audio, or a table would have no rows.
    """
    root, out = Path(root), Path(out)
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise DataError(f"--name {name!r} is not a plain file name")
    paths = find_audio(root)
    if not paths:
        raise DataError(f"{root} has no audio files (.flac .wav .ogg .opus) in it")
    groups, why_single = group_by_split(root, paths, name=name, single=single)
    headers = dict(
        zip(paths, read_headers(root, paths, jobs=jobs, advance=progress(len(paths))), strict=True)
    )
    skipped = [(path, str(got)) for path, got in headers.items() if isinstance(got, DataError)]
    samples = {path: got.samples for path, got in headers.items() if not isinstance(got, DataError)}
    rows = {
        table: sort_rows((path, samples[path]) for path in members if path in samples)
        for table, members in groups.items()
    }
    make_folder(out)
    _write_skipped(out / SKIPPED, skipped)
    for table, members in rows.items():
        if not members:
            raise DataError(f"no file for the table {table} can be read; see {out / SKIPPED}")
    for table, members in rows.items():
        write_table(out / f"{table}.csv", members)
    return LengthTables(rows, skipped, why_single)


def _write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    path.unlink(missing_ok=True)  # one of an earlier run would mislead
    if skipped:
        lines = [f"{ascii(name)[1:-1]}\t{printable(reason)}\n" for name, reason in skipped]
        write_text(path, "".join(lines))
