"""Downstream features on disk, one file for each waveform.

A file: ``EKDF``, a CRC-32 of all behind it, then four little-endian 32-bit numbers (bytes of a
value, layers, frames, width) and the values in the machine's byte order, layer by layer: float16,
or float32 where a value is beyond float16's 65504 or not finite. Names come from the samples alone,
so several processes may write the same file at once: each writes a temporary one and renames it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic import whole_file

logger = logging.getLogger(__name__)

_MAGIC = b"EKDF"
_HEAD = struct.Struct("<4sIIIII")
_DTYPES = {2: torch.float16, 4: torch.float32}
_LARGEST = 65504.0  # of float16
_SPARE = 2 * 10**9  # bytes of the disk that are left for checkpoints and everybody else
_LOOK_AGAIN = 1 << 28  # bytes written by us before others' are counted again


def key_of(wave: Tensor) -> str:
    """A hash of the samples ``[sample]`` and of how many there are."""
    samples = wave.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.blake2b(f"{samples.numel()} ".encode(), digest_size=16)
    digest.update(samples.numpy().data)
    return digest.hexdigest()


def rounded(states: Tensor) -> Tensor:
    """``states`` in the type in which they are kept."""
    # written so that NaN and infinity, which compare as False, stay float32
    return states.half() if bool((states.abs() <= _LARGEST).all()) else states.float()


class FeatureStore:
    """The folder of one upstream.

    Args:
        root: of all upstreams; ``limit_gb`` goes for all that is below it.
        name: of this upstream's folder.
    """

    def __init__(self, root: Path, name: str, limit_gb: float):
        self.root, self.folder = root, root / name
        self._limit = int(limit_gb * 1e9)
        self._size: int | None = None  # of root; counted at the first write
        self._since = 0
        self._full = False
        self.written = 0  # bytes, by this process

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.states"

    def read(self, key: str) -> Tensor | None:
        """``[layer, frame, width]`` in float16 or float32; None where there is no such file.

        A damaged file counts as none, with a warning: it will be written anew.
        """
        path = self.path(key)
        try:
            size = os.stat(path).st_size
            data = bytearray(size)
            with open(path, "rb") as file:
                whole = file.readinto(data) == size
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s); computed again", path, error.strerror)
            return None
        states = _decode(data) if whole else None
        if states is None:
            logger.warning("%s is damaged; made anew", path)
        return states

    def write(self, key: str, states: Tensor) -> None:
        """Keep ``[layer, frame, width]``; once the room is spent, with one warning, nothing."""
        if self._full:
            return
        data, path = _encode(states), self.path(key)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._has_room(len(data)):
                return
            try:
                _put(data, path)
            except FileNotFoundError:  # another `superb` has finished and removed the folder
                _put(data, path)
        except OSError as error:
            self._full = True
            logger.warning("%s: %s; no more is kept there", path, error.strerror)
            return
        self.written += len(data)

    def _has_room(self, more: int) -> bool:
        free = shutil.disk_usage(self.root).free
        if free - more < _SPARE:
            self._full = True
            logger.warning(
                "the disk of %s has only %.1f GB left; no more is kept there", self.root, free / 1e9
            )
            return False
        if self._size is None or self._since >= _LOOK_AGAIN:
            self._size, self._since = folder_size(self.root), 0
        if self._size + more > self._limit:
            self._full = True
            logger.warning(
                "%s has %.1f GB; no more is kept there (raise --cache-features-gb)",
                self.root,
                self._size / 1e9,
            )
            return False
        self._size += more
        self._since += more
        return True


def _put(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, sync=False) as file:  # a file that is cut shows by its checksum
        file.write(data)


def _encode(states: Tensor) -> bytes:
    values = states.detach().cpu().contiguous().numpy()
    body = _HEAD.pack(_MAGIC, 0, values.itemsize, *values.shape)[8:]
    sum_of = zlib.crc32(values.data if values.size else b"", zlib.crc32(body))
    return b"".join((_MAGIC, struct.pack("<I", sum_of), body, values.tobytes()))


def _decode(data: bytearray) -> Tensor | None:
    """None where ``data`` is not what :func:`_encode` gives."""
    if len(data) < _HEAD.size:
        return None
    magic, sum_of, size, *shape = _HEAD.unpack_from(data)
    count = shape[0] * shape[1] * shape[2]
    if magic != _MAGIC or size not in _DTYPES or len(data) != _HEAD.size + size * count:
        return None
    if zlib.crc32(memoryview(data)[8:]) != sum_of:
        return None
    if not count:
        return torch.empty(shape, dtype=_DTYPES[size])
    values = torch.frombuffer(data, dtype=_DTYPES[size], offset=_HEAD.size, count=count)
    return values.view(shape)


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process renames and removes
                total += os.stat(os.path.join(path, name)).st_size
    return total
