"""Entries of a manifest, and the checks that every kind of manifest shares."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ...files.text import CONTROL
from ..audio_files import (
    MAX_SAMPLES,
    OTHER_SUFFIXES,
    SAMPLE_RATE,
    SUFFIXES,
    AudioPart,
    ffmpeg_command,
    is_audio,
)

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class ManifestEntry:
    """An utterance: an audio file, or a segment of one, and what is known about it."""

    location: str  # "FILE: line N", for messages
    path: str  # relative to the manifest's root, with / between the parts
    split: str  # one of SPLITS, or empty if the manifest does not say
    cells: dict[str, str]  # every column by name: text, speaker, ...
    offset: int | None = None  # first sample of a segment, at 16 kHz; None: the whole file
    length: int | None = None  # samples of the segment

    @property
    def name(self) -> str:
        """Unique in a manifest: the path, or ``PATH@OFFSET+LENGTH``."""
        return str(AudioPart(self.path, self.offset, self.length))

    def part(self, root: str | Path) -> AudioPart:
        """The audio below ``root``."""
        return AudioPart(Path(root) / self.path, self.offset, self.length)


@dataclass(frozen=True)
class Manifest:
    """One or more manifests as one.

    Attributes:
        source: their names, for messages.
        root: the folder to which the paths are relative.
        entries: in the order of the manifests.
        tables: name of the length table of each entry.
    """

    source: str
    root: Path
    entries: list[ManifestEntry]
    tables: list[str]


def check_audio_name(path: str, location: str) -> None:
    """Raise DataError unless a path is one line and ends as an audio file that can be read."""
    if CONTROL.search(path):  # it could not be in a table
        raise DataError(f"{location}: the path {path!r} has a control character; rename the file")
    if path.lower().endswith(OTHER_SUFFIXES):
        raise DataError(
            f"{location}: {path} is in a format that cannot be read; convert it with: "
            f"{ffmpeg_command(path)}"
        )
    if not is_audio(path):
        raise DataError(
            f"{location}: the path must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got "
            f"{path!r}"
        )


def segment_samples(offset: str, duration: str, location: str) -> tuple[int, int]:
    """Offset and length in samples at 16 kHz of a segment that a file gives in seconds.

    Raises:
        DataError: they are not numbers, below 0, shorter than a sample or beyond a day.
    """
    try:
        start, seconds = float(offset), float(duration)
        if not math.isfinite(start + seconds):
            raise ValueError
    except ValueError:
        raise DataError(
            f"{location}: expected the start and duration of a segment in seconds, got {offset!r} "
            f"and {duration!r}"
        ) from None
    first, end = round(start * SAMPLE_RATE), round((start + seconds) * SAMPLE_RATE)
    if not 0 <= first < end <= MAX_SAMPLES:
        raise DataError(
            f"{location}: a segment must start at 0 s or later, end after its start and within a "
            f"day, got a start of {start:g} s and a duration of {seconds:g} s"
        )
    return first, end - first


def unknown_split(path: Path) -> DataError:
    """The error for a manifest whose split is needed and not known."""
    return DataError(
        f"{path}: its name does not tell its split; put one of {', '.join(SPLITS)} before it: "
        f"train={path}"
    )


def check_unique(entries: Sequence[ManifestEntry]) -> None:
    """Raise DataError if a file or segment is listed twice."""
    first: dict[str, ManifestEntry] = {}
    for entry in entries:
        other = first.setdefault(entry.name, entry)
        if other is not entry:
            file, _, line = other.location.rpartition(": ")
            where = line if entry.location.startswith(f"{file}: ") else other.location
            raise DataError(f"{entry.location}: the path {entry.name} is also in {where}")


def below_common_root(
    entries: Sequence[ManifestEntry], audio_root: Path | None
) -> tuple[Path, list[ManifestEntry]]:
    """Make the paths of entries relative to one folder.

    Args:
        entries: whose paths are absolute, or relative to ``audio_root`` or, as in Kaldi, to the
            current folder.
        audio_root: the folder; by default the lowest one that contains all files.

    Raises:
        DataError: a file is not below ``audio_root``.
    """
    base = os.path.abspath(audio_root or ".")
    paths = [os.path.abspath(os.path.join(base, entry.path)) for entry in entries]
    root = base if audio_root else os.path.commonpath([os.path.dirname(path) for path in paths])
    result = []
    for entry, path in zip(entries, paths, strict=True):
        if os.path.commonpath([root, path]) != root:
            raise DataError(
                f"{entry.location}: {entry.path} is not below --audio-root {audio_root}"
            )
        relative = PurePosixPath(os.path.relpath(path, root))
        result.append(replace(entry, path=str(relative)))
    return audio_root or Path(root), result
