"""Append one utterance's targets after the other's, so that a cut build loses next to nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .reader import checksum
from .store import RECORD, RECORDS, SCALES, TARGETS, Index, digest, read_records, write_index

EVERY = 10.0  # seconds between two moments from which a machine that lost its power could go on


class CacheWriter:
    """The files of a cache that is being built; what is behind the last whole record is cut off.

    Targets first, their record after them: whatever ends the process, the records that are there
    are of targets that are there. The same goes for a power cut, as the targets are synced before
    their records are written.

    Args:
        folder: exists, and this process alone writes to it.
        index: not complete; its file is written if there is none.

    Attributes:
        records: of the utterances done, in the index's order.

    Raises:
        OSError: the files cannot be written.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._files: dict[str, BinaryIO] = {}
        for name in (RECORDS, TARGETS, *([SCALES] if index.scale_bytes else [])):
            (folder / name).touch()
        records = read_records(folder)[: len(index.utterances)]
        sizes = os.path.getsize(folder / TARGETS), 0
        if index.scale_bytes:
            sizes = sizes[0], os.path.getsize(folder / SCALES)
        frames = np.cumsum(records["frames"], dtype=np.int64)
        done = int(np.searchsorted(frames * index.frame_bytes, sizes[0], side="right"))
        if index.scale_bytes:
            done = min(done, sizes[1] // index.scale_bytes)
        self.records = list(records[:done])
        ends = {
            RECORDS: done * RECORD.itemsize,
            TARGETS: int(frames[done - 1]) * index.frame_bytes if done else 0,
            SCALES: done * index.scale_bytes,
        }
        for name in (TARGETS, SCALES, RECORDS):
            if name == SCALES and not index.scale_bytes:
                continue
            file = self._files[name] = open(folder / name, "r+b")
            file.truncate(ends[name])
            file.seek(0, os.SEEK_END)
        self._waiting: list[np.void] = []
        self._synced = time.monotonic()

    def add(self, stored: np.ndarray, scales: np.ndarray | None, samples: int) -> None:
        """The next utterance's targets ``[frame, column]``. Raises OSError."""
        stored = np.ascontiguousarray(stored)
        last = b"" if scales is None else scales.astype("<f4").tobytes()
        self._files[TARGETS].write(stored)
        if self.index.scale_bytes:
            self._files[SCALES].write(last)
        self._record(len(stored), samples, checksum(stored, last))

    def add_bad(self) -> None:
        """The next utterance has no targets: its audio is bad. Raises OSError."""
        if self.index.scale_bytes:
            self._files[SCALES].write(bytes(self.index.scale_bytes))
        self._record(0, 0, 0)

    def _record(self, frames: int, samples: int, crc: int) -> None:
        record = np.array((frames, samples, crc), RECORD)[()]
        self.records.append(record)
        self._waiting.append(record)
        if time.monotonic() - self._synced > EVERY:
            self.save()

    def save(self) -> None:
        """Put on the disk what was added. Raises OSError."""
        for name in (TARGETS, SCALES):
            if name in self._files:
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
        # Taken out first: Ctrl-C on the way may lose records, and must not write them twice.
        waiting, self._waiting = self._waiting, []
        self._files[RECORDS].write(b"".join(record.tobytes() for record in waiting))
        self._files[RECORDS].flush()
        os.fsync(self._files[RECORDS].fileno())
        self._synced = time.monotonic()

    def finish(self) -> Index:
        """All are there: say so in the index. Raises OSError."""
        self.save()
        values = {**self.index.__dict__, "complete": True, "digest": digest(self.folder)}
        index = Index(**values)
        write_index(self.folder, index)
        return index

    def close(self) -> None:
        """Close the files; what was not saved is cut off at the next start."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk: what is lost was never recorded
                pass
        self._files.clear()
