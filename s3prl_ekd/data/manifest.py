"""Read and check manifests: a corpus as a tab-separated table.

A manifest is UTF-8 text with a header line and no quoting. The columns may be in any order; further
columns are allowed. Paths are relative to the manifest's folder or to a root given by the user, so
that a manifest can be moved together with its audio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import DataError
from .audio_files import SAMPLE_RATE, is_audio, read_headers

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class ManifestEntry:
    """One line of a manifest."""

    line: int  # in the file, counted from 1
    path: str  # relative, with / between the parts
    split: str  # one of SPLITS
    cells: dict[str, str]  # every column by name


def read_manifest(
    path: str | Path, *, columns: Sequence[str] = ("path", "split")
) -> list[ManifestEntry]:
    """Read and check the manifest at ``path``.

    Args:
        path: the TSV file.
        columns: required columns; must include ``path`` and ``split``.

    Raises:
        DataError: there is no such file, it is not UTF-8, it has no lines, a column is missing, or
            a line is invalid: wrong number of cells, a path that is absolute, has ``..`` in it, is
            not an audio file or is repeated, or an unknown split. The message has the line number.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"cannot read {path}: no such file, or not a file")
    try:
        # Not splitlines(): it also splits at characters such as U+2028, which a text may contain.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
    header = lines[0].rstrip("\r").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{path}: line 1: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"expected a tab-separated header, got: {', '.join(header) or 'an empty line'}"
        )
    entries: list[ManifestEntry] = []
    line_of_path: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip(" \r"):
            continue
        location = f"{path}: line {number}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise DataError(f"{location}: expected {len(header)} cells, got {len(cells)}")
        entry = _entry(number, dict(zip(header, cells, strict=True)), location)
        first_line = line_of_path.setdefault(entry.path, number)
        if first_line != number:
            raise DataError(f"{location}: the path {entry.path} is also in line {first_line}")
        entries.append(entry)
    if not entries:
        raise DataError(f"{path}: no lines after the header")
    return entries


def _entry(number: int, cells: dict[str, str], location: str) -> ManifestEntry:
    path, split = cells["path"], cells["split"]
    if not path:
        raise DataError(f"{location}: the path is empty")
    # POSIX and Windows paths, so that the result is the same on every system.
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
        raise DataError(f"{location}: the path must be relative, got {path}")
    if ".." in PurePosixPath(path).parts:
        raise DataError(
            f"{location}: the path must not contain .. (for prepare, set --audio-root), got {path}"
        )
    if not is_audio(path):
        raise DataError(f"{location}: the path must end in .flac, .wav, .ogg or .opus, got {path}")
    if split not in SPLITS:
        raise DataError(f"{location}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return ManifestEntry(number, str(PurePosixPath(path)), split, cells)


def audio_lengths(
    manifest: Path,
    root: Path,
    entries: Sequence[ManifestEntry],
    *,
    jobs: int = 8,
    advance: Callable[[int], object] = lambda count: None,
) -> list[int]:
    """Check that all entries are 16 kHz mono and return their lengths in samples.

    Args:
        manifest: the manifest's path, for error messages.
        root: folder that the paths of ``entries`` are relative to.
        jobs, advance: see :func:`read_headers`.

    Raises:
        DataError: a file is missing or damaged, or is not 16 kHz mono.
    """
    lengths = []
    headers = read_headers(root, [entry.path for entry in entries], jobs=jobs, advance=advance)
    for entry, header in zip(entries, headers, strict=True):
        location = f"{manifest}: line {entry.line}"
        if isinstance(header, DataError):
            raise DataError(f"{location}: {header}") from header
        if header.rate != SAMPLE_RATE or header.channels != 1:
            raise DataError(
                f"{location}: {entry.path} must be {SAMPLE_RATE} Hz mono for s3prl's recipes, got "
                f"{header.rate} Hz with {header.channels} channel{'s' * (header.channels > 1)}; "
                "convert it first"
            )
        lengths.append(header.frames)
    return lengths
