"""Kaldi's data folders: ``wav.scp``, and ``segments``, ``text``, ``utt2spk`` where there are.

A line of ``wav.scp`` is a name and the path of an audio file. A line of ``segments`` is the name of
an utterance, that of its recording, and start and end in seconds. Commands in ``wav.scp``, which
end with ``|``, are never executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import DataError
from ...files.text import read_text
from .entries import ManifestEntry, below_common_root, check_audio_name, segment_samples

SCP, SEGMENTS = "wav.scp", "segments"
LABEL_FILES = {"text": "text", "speaker": "utt2spk"}  # column -> file
MAX_BYTES = 1 << 34
_ARCHIVE = re.compile(r"\.ark(:\d+)?(\[.*\])?$")
_FLAC = re.compile(r"flac\s(?:-\S+\s+)*(\S+\.flac)\s*\|")


def is_kaldi(path: Path) -> bool:
    """Whether a folder is one of Kaldi's data folders."""
    return (path / SCP).is_file()


def read_kaldi(
    folder: Path, columns: Sequence[str], audio_root: Path | None, split: str
) -> tuple[Path, list[ManifestEntry]]:
    """Read a folder; return the folder that contains its audio and its entries.

    The column ``id`` is the utterance's name.

    Args:
        columns: required columns; ``text`` and ``speaker`` are read if their files are there.
        audio_root: the folder that relative paths are relative to, and that must contain all audio;
            by default the current folder, as in Kaldi, and the lowest folder with all audio.
        split: of all entries.

    Raises:
        DataError: a file is missing or invalid, or a line is: a command, an entry of an archive,
            an unknown recording, a wrong number of cells.
    """
    for column, name in LABEL_FILES.items():
        if column in columns and not (folder / name).is_file():
            raise DataError(f"{folder} has no file {name}, from which the column {column} is read")
    unknown = [name for name in columns if name not in ("path", "split", *LABEL_FILES)]
    if unknown:
        raise DataError(
            f"{folder}: a Kaldi folder has no column {unknown[0]}; use a tab-separated manifest"
        )
    recordings = {
        name: (audio_path(name, value, location), location)
        for location, name, value in _lines(folder / SCP)
    }
    labels = {
        column: {utterance: value for _, utterance, value in _lines(folder / name)}
        for column, name in LABEL_FILES.items()
        if (folder / name).is_file()
    }
    if (folder / SEGMENTS).is_file():
        entries = [
            _segment(location, utterance, value, recordings, split)
            for location, utterance, value in _lines(folder / SEGMENTS)
        ]
    else:
        entries = [
            ManifestEntry(location, path, split, {"id": name})
            for name, (path, location) in recordings.items()
        ]
    for entry in entries:
        for column, values in labels.items():
            # without tabs, as in a table
            entry.cells[column] = " ".join(values.get(entry.cells["id"], "").split())
    return below_common_root(entries, audio_root)


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the location, the first word and the rest of each line. Raises DataError."""
    first_lines: dict[str, int] = {}
    text = read_text(path, "file of a Kaldi folder", DataError, MAX_BYTES, "utf-8-sig")
    for number, line in enumerate(text.split("\n"), start=1):
        name, *rest = line.split(maxsplit=1)[:2] or [""]
        if not name:
            continue
        first = first_lines.setdefault(name, number)
        if first != number:
            raise DataError(f"{path}: line {number}: {name} is also in line {first}")
        yield f"{path}: line {number}", name, rest[0].strip() if rest else ""
    if not first_lines:
        raise DataError(f"{path} is empty")


def audio_path(name: str, value: str, location: str) -> str:
    """Check the path of the recording ``name`` in ``wav.scp``; return it.

    Raises:
        DataError: it is a command, an entry of an archive, or not an audio file.
    """
    if value.endswith("|") or value.startswith("|"):
        flac = _FLAC.fullmatch(value)
        instead = (
            f"put {flac[1]} there" if flac else "write its output to a file and put that there"
        )
        raise DataError(
            f"{location}: {name} is a command ({value[:80]}), and commands are not executed; "
            f"{instead}"
        )
    if _ARCHIVE.search(value):
        raise DataError(
            f"{location}: {name} is in an archive ({value[:80]}), which cannot be read; put the "
            "path of an audio file there"
        )
    check_audio_name(value, location)
    return value


def _segment(
    location: str, utterance: str, value: str, recordings: dict[str, tuple[str, str]], split: str
) -> ManifestEntry:
    cells = value.split()
    if len(cells) != 3:
        raise DataError(
            f"{location}: expected utterance, recording, start and end in seconds, got "
            f"{len(cells) + 1} cells"
        )
    recording, start, end = cells
    if recording not in recordings:
        raise DataError(f"{location}: the recording {recording} is not in {SCP}")
    try:
        duration = repr(float(end) - float(start))
    except ValueError:
        duration = end
    offset, length = segment_samples(start, duration, location)
    return ManifestEntry(
        location, recordings[recording][0], split, {"id": utterance}, offset, length
    )
