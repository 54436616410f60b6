"""Targets of a batch's utterances out of a cache, in whatever process asks for them."""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.bad_audio import BadAudio
from ..errors import DataError
from .layout import Layout, Part, parted, pieces
from .numbers import NUMPY, to_tensor
from .store import BUILD, SCALES, TARGETS, Index, checked_records, read_index


class StoredTargets(NamedTuple):
    """Targets of a batch on their way to the device: as they are stored, so no larger than needed.

    ``values`` ``[batch, frame, column]``, zeros behind the end of each; ``frames`` ``[batch]``;
    ``scales`` ``[batch, piece]`` where the numbers are int8; ``layout`` of the columns.
    """

    values: Tensor
    frames: Tensor
    scales: Tensor | None
    layout: Layout

    def on(self, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """``{name: [batch, target, frame, dim]}`` in float32, and how many frames each has."""
        values = self.values.to(device, non_blocking=True)
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        # a pinned copy may come back with lists in the place of tuples
        return parted(values, scales, self.layout), self.frames.to(device, non_blocking=True)


class TargetReader:
    """A complete cache, read only; any number of processes may have one.

    The files are mapped where they are first read, so a worker process has a map of its own whether
    it was forked or spawned. An utterance's checksum is looked at when a process first reads it.

    Args:
        folder: of the cache.
        index: of it, where it was read already.

    Attributes:
        seed: of the excerpts that the teachers heard, all drawn as for epoch 0.
        part: what :meth:`batch` gives; everything, unless it is set.

    Raises:
        DataError: it is not complete, or damaged.
    """

    def __init__(self, folder: str | Path, index: Index | None = None):
        self.folder = Path(folder)
        self.index = read_index(self.folder) if index is None else index
        self.records = checked_records(self.folder, self.index)
        self.seed = self.index.seed
        ends = np.cumsum(self.records["frames"], dtype=np.int64)
        self._starts = ends - self.records["frames"]
        self._rows = {name: row for row, name in enumerate(self.index.utterances)}
        self._width = self.index.frame_bytes // np.dtype(NUMPY[self.index.dtype]).itemsize
        every = tuple(range(pieces(self.index.layout)))
        self.part = Part(self.index.layout, ((0, self._width),), every)
        self._targets = self._scales = None
        self._seen = np.zeros(len(self.records), bool)

    def __getstate__(self) -> dict:
        """Without the maps: pickled for a spawned worker they would be copies of the files."""
        return {**self.__dict__, "_targets": None, "_scales": None}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def check(self, name: str, samples: int) -> None:
        """Refuse an utterance that has no targets, or not those of these ``samples``.

        Raises:
            BadAudio: its audio was bad when the cache was built.
            DataError: the audio is longer or shorter than it was then.
        """
        frames, heard, _ = self.records[self._rows[name]]
        if frames == 0:
            raise BadAudio(
                name, "no targets", f"it was bad when the target cache {self.folder} was built"
            )
        if heard != samples:
            raise DataError(
                f"{name} has {samples} samples to hear and the teachers heard {heard} when the "
                f"target cache {self.folder} was built: its audio has changed; build another with: "
                f"{BUILD} NEW_FOLDER"
            )

    def batch(self, names: Sequence[str]) -> StoredTargets:
        """The targets of utterances that :meth:`check` has nothing against.

        Raises:
            DataError: the file's contents have changed since it was built.
        """
        if self._targets is None:
            self._map()
        rows = [self._rows[name] for name in names]
        frames = self.records["frames"][rows].astype(np.int64)
        layout, spans, wanted = self.part
        width = sum(end - begin for begin, end in spans)
        values = np.empty((len(rows), frames.max(), width), NUMPY[self.index.dtype])
        for i, row in enumerate(rows):
            count, start = frames[i], self._starts[row]
            stored = self._targets[start : start + count]
            if not self._seen[row]:
                self._verify(row, stored)
            column = 0
            for begin, end in spans:
                values[i, :count, column : column + end - begin] = stored[:, begin:end]
                column += end - begin
            values[i, count:] = 0
        scales = None
        if self._scales is not None:
            scales = torch.from_numpy(self._scales[rows][:, list(wanted)])
        return StoredTargets(
            to_tensor(values, self.index.dtype), torch.from_numpy(frames), scales, layout
        )

    def _map(self) -> None:
        if self.records["frames"].any():
            shape = (-1, self._width)
            kind = NUMPY[self.index.dtype]
            self._targets = np.memmap(self.folder / TARGETS, kind, mode="r").reshape(shape)
        if self.index.scale_bytes:
            shape = (len(self.records), -1)
            self._scales = np.memmap(self.folder / SCALES, np.float32, mode="r").reshape(shape)

    def _verify(self, row: int, stored: np.ndarray) -> None:
        scales = b"" if self._scales is None else self._scales[row].tobytes()
        if checksum(stored, scales) != self.records["crc"][row]:
            raise DataError(
                f"the target cache is damaged: in {self.folder / TARGETS} the targets of "
                f"{self.index.utterances[row]} have changed since they were written; build it anew "
                f"with --force: {BUILD} {shlex.quote(str(self.folder))} --force"
            )
        self._seen[row] = True


def checksum(stored: np.ndarray, scales: bytes = b"") -> int:
    """CRC-32 of an utterance's targets ``[frame, column]`` and then its scales."""
    return zlib.crc32(scales, zlib.crc32(stored))
