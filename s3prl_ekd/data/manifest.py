"""Manifests: a corpus as one tab-separated table, and everything that can be wrong with it.

UTF-8, a header line, no quoting. The columns may stand in any order and more are allowed. Paths
are relative (to the manifest's folder, or to a root that the user names), because a manifest and
its audio travel together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import DataError
from .audio_files import SAMPLE_RATE, is_audio, read_headers

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Entry:
    """One line of a manifest."""

    line: int  # in the file, counted from 1
    path: str  # relative, with / between the parts
    split: str  # one of SPLITS
    cells: dict[str, str]  # every column by name


def read_manifest(path: str | Path, *, columns: Sequence[str] = ("path", "split")) -> list[Entry]:
    """Every line of the manifest at ``path``.

    Args:
        path: the TSV file.
        columns: the columns that must be there, ``path`` and ``split`` among them.

    Raises:
        DataError: no such file, not UTF-8, columns are missing, a line has another number of
            cells than the header, a path is absolute, leads upwards, is no audio file or is there
            twice, a split has another name, or there are no lines. The message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    try:
        # Not splitlines(): it also breaks at characters that a text may hold, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    header = lines[0].rstrip("\r").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{path}: line 1 lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} "
            f"(a tab-separated header; it has: {', '.join(header) or 'nothing'})"
        )
    entries: list[Entry] = []
    line_of_path: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip(" \r"):
            continue
        where = f"{path}: line {number}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise DataError(f"{where} has {len(cells)} cells, the header has {len(header)}")
        entry = _entry(number, dict(zip(header, cells, strict=True)), where)
        first = line_of_path.setdefault(entry.path, number)
        if first != number:
            raise DataError(f"{where} repeats the path {entry.path} of line {first}")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path} has a header and no lines below it")
    return entries


def _entry(number: int, cells: dict[str, str], where: str) -> Entry:
    path, split = cells["path"], cells["split"]
    if not path:
        raise DataError(f"{where} has no path")
    # Both kinds, so that a manifest is good or bad on every system alike.
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
        raise DataError(f"{where} has an absolute path ({path}); paths must be relative")
    if ".." in PurePosixPath(path).parts:
        raise DataError(f"{where} has a path with .. in it ({path}); name the root instead")
    if not is_audio(path):
        raise DataError(f"{where}: {path} is not called .flac, .wav, .ogg or .opus")
    if split not in SPLITS:
        raise DataError(f"{where} has the split {split!r}; known: {', '.join(SPLITS)}")
    return Entry(number, str(PurePosixPath(path)), split, cells)


def measure(
    manifest: Path,
    root: Path,
    entries: Sequence[Entry],
    *,
    jobs: int = 8,
    advance: Callable[[int], object] = lambda done: None,
) -> list[int]:
    """Lengths of the entries in samples, after checking that all are 16 kHz mono.

    Args:
        manifest: for messages.
        root: folder that the paths of ``entries`` are relative to.
        jobs, advance: see :func:`read_headers`.

    Raises:
        DataError: a file is missing, damaged, of another rate or has more channels.
    """
    lengths = []
    headers = read_headers(root, [entry.path for entry in entries], jobs=jobs, advance=advance)
    for entry, header in zip(entries, headers, strict=True):
        where = f"{manifest}: line {entry.line}"
        if isinstance(header, DataError):
            raise DataError(f"{where}: {header}") from header
        if header.rate != SAMPLE_RATE or header.channels != 1:
            raise DataError(
                f"{where}: {entry.path} is {header.rate} Hz with {header.channels} "
                f"channel{'s' * (header.channels > 1)}; "
                f"s3prl's recipes need {SAMPLE_RATE} Hz mono, convert it first"
            )
        lengths.append(header.frames)
    return lengths
