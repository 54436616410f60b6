"""Write length tables: the CSV files in s3prl's ``len_for_bucket`` folders.

The columns are an unnamed index, ``file_path``, ``length`` in samples at 16 kHz, and ``label``,
which is empty; if there are segments, also ``offset`` in samples at 16 kHz, which s3prl's own
datasets do not read. The longest utterance comes first. s3prl's script for this,
``preprocess/generate_len_for_bucket.py``, gives the same numbers, but it is not in s3prl's PyPI
package, is interactive and supports three corpora only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, printable
from ..files.atomic import make_folder, write_csv, write_text
from .audio_files import (
    SAMPLE_RATE,
    SUFFIXES,
    AudioHeader,
    AudioPart,
    find_audio,
    read_headers,
    total_hours,
)
from .manifest import Manifest, is_manifest, read_manifest
from .tables import OFFSET, Utterance, sort_key

SKIPPED = "skipped.txt"
_SPLIT_NAME = re.compile(r"(train|dev|test|valid)", re.IGNORECASE)


@dataclass(frozen=True)
class LengthTables:
    """The result of :func:`write_length_tables`."""

    rows: dict[str, list[Utterance]]  # table name -> rows, longest first
    skipped: list[tuple[str, str]]  # (name, reason) of the utterances in no table
    why_single: str | None  # see group_by_split
    root: Path  # the folder that paths are relative to

    def summary(self) -> str:
        """Utterances and hours of each table, and the files left out, as text."""
        tables = {f"{printable(name)}.csv": rows for name, rows in self.rows.items()}
        tables["total"] = [row for rows in self.rows.values() for row in rows]
        lines = [
            f"{name}: {len(rows)} utterances, {total_hours(row.length for row in rows):.2f} h"
            for name, rows in tables.items()
        ]
        if self.why_single:
            lines.append(f"wrote a single table because {printable(self.why_single)}")
        if self.skipped:
            names = ", ".join(printable(path) for path, _ in self.skipped[:3])
            more = f" and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"left out {len(self.skipped)} ({names}{more}); see {SKIPPED}")
        return "\n".join(lines)


def write_table(path: str | Path, rows: Iterable[Utterance]) -> None:
    """Write one table, the longest utterance first; the write is atomic."""
    rows = sorted(rows, key=sort_key)
    lines: list[list[Any]] = [["", "file_path", "length", "label", OFFSET]]
    lines += ([i, row.path, row.length, "", row.offset] for i, row in enumerate(rows))
    columns = 5 if any(row.offset is not None for row in rows) else 4
    write_csv(path, (line[:columns] for line in lines), line_end="\n")


@dataclass(frozen=True)
class MeasuredAudio:
    """Length of a file or segment, and whether the file is 16 kHz mono."""

    samples: int  # at 16 kHz
    header: AudioHeader

    @property
    def is_16k_mono(self) -> bool:
        return (self.header.rate, self.header.channels) == (SAMPLE_RATE, 1)


def measure_audio(
    root: str | Path, parts: Sequence[AudioPart], *, jobs: int = 8, bar: bool = False
) -> list[MeasuredAudio | DataError]:
    """Read the lengths of files and segments below ``root``; an error in place of a bad one.

    The header of a file is read once, however many of its segments are in ``parts``.
    """
    paths = list(dict.fromkeys(str(part.path) for part in parts))
    headers = dict(zip(paths, read_headers(root, paths, jobs=jobs, bar=bar), strict=True))
    measured: list[MeasuredAudio | DataError] = []
    for part in parts:
        header = headers[str(part.path)]
        if isinstance(header, DataError):
            measured.append(header)
            continue
        try:
            measured.append(MeasuredAudio(part.samples_of(header.samples), header))
        except DataError as error:
            measured.append(error)
    return measured


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
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    name: str | None = None,
    single: bool = False,
    audio_root: Path | None = None,
    jobs: int = 8,
    bar: bool = False,
) -> LengthTables:
    """Write length tables for a folder of audio, or for manifests, into the folder ``out``.

    Unusable files and the reasons are listed in ``out/skipped.txt``.

    Args:
        sources: a folder, or manifests (:mod:`.manifest`), which may have segments of files.
        name: write a single table with this name.
        single: write a single table even if there are several splits.
        audio_root: of the manifests' paths.
        jobs, bar: see :func:`read_headers`.

    Raises:
        DataError: no such folder, no audio, an invalid manifest, ``audio_root`` without a manifest,
            or a table would have no rows.
    """
    sources, out = [sources] if isinstance(sources, (str, Path)) else list(sources), Path(out)
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise DataError(f"--name must be a file name without a folder, got {name!r}")
    if name is not None and name.endswith(".csv"):
        raise DataError(f"--name must be the name of a set, without .csv, got {name!r}")
    root, groups, why_single = Path(sources[0]), {}, None
    if len(sources) > 1 or is_manifest(sources[0]):
        manifest = read_manifest(sources, columns=("path",), audio_root=audio_root)
        root, groups = manifest.root, _group_by_table(manifest, name, single)
    elif not root.is_dir():
        raise DataError(
            f"no such folder or manifest: {root}; give a folder of audio, a table (.tsv), a Kaldi "
            "folder or cuts (.jsonl.gz)"
        )
    elif audio_root is not None:
        raise DataError(f"--audio-root is for manifests, and {root} is a folder; leave it out")
    else:
        paths = find_audio(root)
        if not paths:
            raise DataError(f"no audio files ({' '.join(SUFFIXES)}) below {root}")
        by_split, why_single = group_by_split(root, paths, name=name, single=single)
        groups = {table: [AudioPart(path) for path in own] for table, own in by_split.items()}
    parts = [part for members in groups.values() for part in members]
    skipped: list[tuple[str, str]] = []
    samples: dict[AudioPart, int] = {}
    for part, audio in zip(parts, measure_audio(root, parts, jobs=jobs, bar=bar), strict=True):
        if isinstance(audio, DataError):
            skipped.append((str(part), str(audio)))
        elif "\r" in str(part.path):  # csv does not quote it
            skipped.append((str(part), "its name has a carriage return; rename the file"))
        else:
            samples[part] = audio.samples
    rows = {
        table: sorted(
            (
                Utterance(str(part.path), samples[part], part.offset)
                for part in members
                if part in samples
            ),
            key=sort_key,
        )
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
    return LengthTables(rows, skipped, why_single, root)


def _group_by_table(
    manifest: Manifest, name: str | None, single: bool
) -> dict[str, list[AudioPart]]:
    """The utterances in each table, by the manifest's splits or the names of its sources."""
    groups: dict[str, list[AudioPart]] = {}
    for entry, table in zip(manifest.entries, manifest.tables, strict=True):
        table = name or ("all" if single else table)
        groups.setdefault(table, []).append(AudioPart(entry.path, entry.offset, entry.length))
    return groups
