"""Read and check manifests: a corpus as a tab-separated table.

A manifest is UTF-8 text with a header line and no quoting. The columns may be in any order; further
columns are allowed. Paths are relative to the manifest's folder or to a root given by the user, so
that a manifest can be moved together with its audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import DataError
from ..files.text import read_text
from .audio_files import is_audio

SPLITS = ("train", "dev", "test")
MAX_LIST = 256 << 20  # bytes of a list of files; VoxCeleb1's has 5 MB


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
        columns: required columns; must include ``path`` and ``split``.

    Raises:
        DataError: the file cannot be read, has no lines or lacks a column; or a line, which the
            message names, has a wrong number of cells, an unknown split, or a path that is
            absolute, has ``..`` in it, is not an audio file or is repeated.
    """
    # Not splitlines(): it also splits at characters such as U+2028, which a text may contain.
    lines = read_text(path, "manifest", DataError, 1 << 34, "utf-8-sig").split("\n")
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
    text, split = cells["path"], cells["split"]
    path = PurePosixPath(text)
    problem = ""
    if path.is_absolute() or PureWindowsPath(text).drive:  # the same result on every system
        problem = "must be relative"
    elif ".." in path.parts:
        problem = "must not contain .. (for prepare, set --audio-root)"
    elif not is_audio(text):
        problem = "must end in .flac, .wav, .ogg or .opus"
    if problem:
        raise DataError(f"{location}: the path {problem}, got {text!r}")
    if split not in SPLITS:
        raise DataError(f"{location}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return ManifestEntry(number, str(path), split, cells)
