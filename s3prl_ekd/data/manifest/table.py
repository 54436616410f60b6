"""Manifests as tab-separated tables: our own, and Common Voice's.

A manifest is UTF-8 text with a header line and no quoting. The columns may be in any order; further
columns are allowed. Paths are relative to the manifest's folder or to a root given by the user, so
that a manifest can be moved together with its audio. With a column ``offset``, a line is a segment
of a file; ``offset`` and ``duration`` are in seconds.

Common Voice's tables have the columns ``client_id``, ``path`` and ``sentence``; the audio is in the
folder ``clips`` next to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from ...errors import DataError
from ...files.text import read_text
from .entries import SPLITS, ManifestEntry, check_audio_name, segment_samples, unknown_split

COMMON_VOICE = ("client_id", "path", "sentence")  # columns
CLIPS = "clips"
MAX_BYTES = 1 << 34


def read_table(
    path: Path, columns: Sequence[str], audio_root: Path | None, split: str
) -> tuple[Path, list[ManifestEntry]]:
    """Read a table; return the folder of its audio and its entries.

    Args:
        columns: required columns.
        audio_root: the folder of the audio, if it is not that of the manifest.
        split: of a table without the column ``split``; empty if it is not known.

    Raises:
        DataError: the file cannot be read, has no lines or lacks a column; or a line, which the
            message names, has a wrong number of cells, an unknown split, or a path that is
            absolute, has ``..`` in it or is not an audio file.
    """
    # Not splitlines(): it also splits at characters such as U+2028, which a text may contain.
    lines = read_text(path, "manifest", DataError, MAX_BYTES, "utf-8-sig").split("\n")
    header = lines[0].rstrip("\r").split("\t")
    is_common_voice = set(COMMON_VOICE) <= set(header) and "split" not in header
    given = {*header, "text", "speaker"} if is_common_voice else set(header)
    if split:
        given.add("split")
    missing = [column for column in dict.fromkeys(("path", *columns)) if column not in given]
    if missing == ["split"] and is_common_voice:
        raise unknown_split(path)
    if missing:
        raise DataError(
            f"{path}: line 1: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"expected a tab-separated header, got: {', '.join(header) or 'an empty line'}"
        )
    twice = [name for name in dict.fromkeys(header) if name and header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: line 1: the column {twice[0]} is there twice; remove one")
    needs_split = "split" in {*header, *columns}
    entries: list[ManifestEntry] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip(" \r"):
            continue
        location = f"{path}: line {number}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) != len(header):
            raise DataError(f"{location}: expected {len(header)} cells, got {len(cells)}")
        values = dict(zip(header, cells, strict=True))
        if is_common_voice:
            values |= {"text": values["sentence"], "speaker": values["client_id"]}
        entries.append(_entry(location, values, values.get("split", split), needs_split))
    if not entries:
        raise DataError(f"{path}: no lines after the header")
    folder = path.parent / CLIPS if is_common_voice else path.parent
    return audio_root or folder, entries


def _entry(location: str, cells: dict[str, str], split: str, needs_split: bool) -> ManifestEntry:
    text = cells["path"]
    path = PurePosixPath(text)
    problem = ""
    if path.is_absolute() or PureWindowsPath(text).drive:  # the same result on every system
        problem = "must be relative"
    elif ".." in path.parts:
        problem = "must not contain .. (set --audio-root)"
    if problem:
        raise DataError(f"{location}: the path {problem}, got {text!r}")
    check_audio_name(text, location)
    if (split or needs_split) and split not in SPLITS:
        raise DataError(f"{location}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    offset, length = None, None
    if cells.get("offset"):
        offset, length = segment_samples(cells["offset"], cells.get("duration", ""), location)
    return ManifestEntry(location, str(path), split, cells, offset, length)
