"""Whose targets go into a cache, how large it gets, and whether the disk has room for it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.audio_files import SAMPLE_RATE
from ...data.bad_audio import Bad
from ...data.buckets import used, within
from ...data.tables import Utterance, read_tables
from ...distill.conv_spec import ConvLayers
from ...distill.settings import StudentSettings
from ...errors import SetupError
from ...hidden_states.store import RECORD, RECORDS, SCALES, TARGETS, Index
from ..settings import DataSettings

logger = logging.getLogger(__name__)

SPARE = 64 << 20  # bytes left free for what else goes on


def cached_rows(data: DataSettings, student: StudentSettings) -> list[Utterance]:
    """The utterances of ``sets`` and ``dev_sets``, the longest first.

    Raises:
        DataError: see :func:`....read_tables`.
    """
    rows: dict[str, Utterance] = {}
    bad: list[Bad] | None = [] if data.on_bad_audio == "skip" else None
    for sets in (data.sets, data.dev_sets):
        if sets:
            every = read_tables(data.file_path, sets, bad)
            rows |= {row.path: row for row in within(every, data.max_timestep, student.min_samples)}
    if bad:
        logger.warning("left out %d: %s: %s", len(bad), bad[0].path, bad[0].reason)
    return sorted(rows.values(), key=lambda row: (-row.length, row.path))


def frames_of(samples: int, conv: ConvLayers) -> int:
    """Frames of a waveform."""
    for _, kernel, stride in conv:
        samples = (samples - kernel) // stride + 1
    return samples


@dataclass(frozen=True)
class Size:
    """Of a cache, by the tables' lengths: ``utterances``, ``seconds`` of audio, ``bytes``."""

    utterances: int
    seconds: float
    bytes: int

    @property
    def gigabytes(self) -> float:
        return self.bytes / 1e9


def size_of(
    rows: Sequence[Utterance], sequence_length: int, index: Index, conv: ConvLayers
) -> Size:
    """The size that a cache of these utterances will have."""
    lengths = [used(row, sequence_length) for row in rows]
    frames = sum(frames_of(length, conv) for length in lengths)
    names = sum(len(row.path) + 4 for row in rows)  # in the index
    each = RECORD.itemsize + index.scale_bytes
    total = frames * index.frame_bytes + len(rows) * each + names
    return Size(len(rows), sum(lengths) / SAMPLE_RATE, total)


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, or of the nearest one above it that exists.

    Raises:
        SetupError: it cannot be told.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError as error:
        raise SetupError(f"cannot use {there}: {error.strerror}") from None


def there_already(folder: Path) -> int:
    """Bytes of a cut build, or of the cache that is replaced."""
    files = (folder / name for name in (TARGETS, SCALES, RECORDS))
    return sum(path.stat().st_size for path in files if path.is_file())


def check_room(size: Size, folder: Path) -> None:
    """Raise SetupError where the disk has not enough room for the rest of a cache."""
    need, free = size.bytes - there_already(folder) + SPARE, free_bytes(folder)
    if need > free:
        raise SetupError(
            f"the targets need {need / 1e9:.3f} GB more and the disk of {folder} has "
            f"{free / 1e9:.3f} GB free; name a folder on another disk, or make them smaller with "
            "--dtype int8 or --aggregated"
        )
