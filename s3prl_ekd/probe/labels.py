"""Labels of the probes, read from manifests.

Besides ``path`` and ``split``, a manifest has one or more of the columns ``segments`` (phones, see
:mod:`..data.manifest.phones`), ``speaker`` and ``emotion``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.audio_files import AudioPart
from ..data.manifest import read_manifest
from ..data.manifest.phones import SEGMENTS, Segment, parse_segments
from ..errors import DataError

SPEAKER, EMOTION = "speaker", "emotion"  # columns


@dataclass(frozen=True)
class LabelledUtterance:
    """An audio file, or a segment of it, and its labels; an empty one is not known."""

    path: Path
    split: str
    speaker: str = ""
    emotion: str = ""
    segments: tuple[Segment, ...] = ()
    offset: int | None = None  # first sample of a segment of the file, at 16 kHz
    length: int | None = None  # samples of the segment

    @property
    def part(self) -> AudioPart:
        return AudioPart(self.path, self.offset, self.length)

    @property
    def name(self) -> str:
        return str(self.part)


def read_labels(manifest: str | Path) -> list[LabelledUtterance]:
    """Read a manifest, or a Kaldi folder: a column of labels and a split are enough.

    Raises:
        DataError: see :func:`...data.manifest.read_manifest`; no column has labels, or a segment is
            not of the form ``PHONE:START+LENGTH``.
    """
    read = read_manifest(manifest)
    entries, root = read.entries, read.root
    columns = (SEGMENTS, SPEAKER, EMOTION)
    if not any(entry.cells.get(column) for entry in entries for column in columns):
        raise DataError(
            f"{manifest} has no labels; add a column speaker, emotion, or segments (s3prl-ekd "
            "prepare alignments writes it)"
        )
    return [
        LabelledUtterance(
            root / entry.path,
            entry.split,
            entry.cells.get(SPEAKER, ""),
            entry.cells.get(EMOTION, ""),
            parse_segments(entry),
            entry.offset,
            entry.length,
        )
        for entry in entries
    ]


def speaker_folds(utterances: Sequence[LabelledUtterance], most: int) -> dict[str, int]:
    """Assign each speaker to one of at most ``most`` folds with similar numbers of utterances.

    Returns:
        Speaker -> fold, from 0. With ``most`` speakers or fewer, each has a fold of its own.
    """
    counts: dict[str, int] = {}
    for utterance in utterances:
        counts[utterance.speaker] = counts.get(utterance.speaker, 0) + 1
    sizes = [0] * min(most, len(counts))
    folds = {}
    for speaker in sorted(counts, key=lambda name: (-counts[name], name)):
        folds[speaker] = sizes.index(min(sizes))
        sizes[folds[speaker]] += counts[speaker]
    return folds
