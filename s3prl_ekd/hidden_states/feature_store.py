"""Cache of downstream features on disk, one file for each waveform.

File format: ``EKDF``, a CRC-32 of the bytes that follow it, four little-endian 32-bit numbers
(bytes of a value, layers, frames, width), then the values in the machine's byte order, layer by
layer. They are float16, or float32 if a value exceeds float16's 65504 or is not finite. File names
depend on the samples only. Several processes may write the same file: each writes a temporary file
and renames it.
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

from ..files.atomic import atomic_file

logger = logging.getLogger(__name__)

_MAGIC = b"EKDF"
_HEAD = struct.Struct("<4sIIIII")
_DTYPES = {2: torch.float16, 4: torch.float32}
_FLOAT16_MAX = 65504.0
_SPARE = 2 * 10**9  # bytes of the disk left free, for checkpoints and other users
_RECOUNT = 1 << 28  # bytes written by this process before the folder's size is counted again


def wave_key(wave: Tensor) -> str:
    """Hash of a waveform ``[sample]`` and its length."""
    samples = wave.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.blake2b(f"{samples.numel()} ".encode(), digest_size=16)
    digest.update(samples.numpy().data)
    return digest.hexdigest()


def to_storage_dtype(states: Tensor) -> Tensor:
    """Convert ``states`` to the dtype in which they are stored."""
    # NaN and infinity compare as False, so they stay float32
    return states.half() if bool((states.abs() <= _FLOAT16_MAX).all()) else states.float()


class FeatureStore:
    """Feature cache of one upstream.

    Args:
        root: the folder of all upstreams; ``limit_gb`` limits its total size.
        name: the name of this upstream's folder.
    """

    def __init__(self, root: Path, name: str, limit_gb: float):
        self.root, self.folder = root, root / name
        self._limit = int(limit_gb * 1e9)
        self._size: int | None = None  # bytes in root, counted at the first write
        self._since_count = 0  # bytes written since the size was counted
        self._full = False
        self.written = 0  # bytes written by this process

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.states"

    def read(self, key: str) -> Tensor | None:
        """Read ``[layer, frame, width]`` in float16 or float32; None if the file does not exist.

        A damaged file counts as missing, with a warning, and is overwritten later.
        """
        path = self.path(key)
        try:
            size = os.stat(path).st_size
            data = bytearray(size)
            with open(path, "rb") as file:
                complete = file.readinto(data) == size
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("cannot read %s: %s; computing it again", path, error.strerror)
            return None
        states = _decode(data) if complete else None
        if states is None:
            logger.warning("%s is damaged; computing it again", path)
        return states

    def write(self, key: str, states: Tensor) -> None:
        """Store ``[layer, frame, width]``; without space left, warn once and store nothing more."""
        if self._full:
            return
        data, path = _encode(states), self.path(key)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self._has_room(len(data)):
                return
            try:
                _put(data, path)
            except FileNotFoundError:  # another `superb` run has ended and removed the folder
                _put(data, path)
        except OSError as error:
            self._full = True
            logger.warning("cannot write %s: %s; caching no more features", path, error.strerror)
            return
        self.written += len(data)

    def _has_room(self, size: int) -> bool:
        free = shutil.disk_usage(self.root).free
        if free - size < _SPARE:
            self._full = True
            logger.warning(
                "only %.1f GB are free on the disk of %s; caching no more features",
                free / 1e9,
                self.root,
            )
            return False
        if self._size is None or self._since_count >= _RECOUNT:
            self._size, self._since_count = folder_size(self.root), 0
        if self._size + size > self._limit:
            self._full = True
            logger.warning(
                "%s has reached %.1f GB; caching no more features (raise --cache-features-gb)",
                self.root,
                self._size / 1e9,
            )
            return False
        self._size += size
        self._since_count += size
        return True


def _put(data: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as file:  # the CRC detects a truncated file
        file.write(data)


def _encode(states: Tensor) -> bytes:
    values = states.detach().cpu().contiguous().numpy()
    body = _HEAD.pack(_MAGIC, 0, values.itemsize, *values.shape)[8:]
    crc = zlib.crc32(values.data if values.size else b"", zlib.crc32(body))
    return b"".join((_MAGIC, struct.pack("<I", crc), body, values.tobytes()))


def _decode(data: bytearray) -> Tensor | None:
    """Inverse of :func:`_encode`; None if ``data`` is damaged."""
    if len(data) < _HEAD.size:
        return None
    magic, crc, size, *shape = _HEAD.unpack_from(data)
    count = shape[0] * shape[1] * shape[2]
    if magic != _MAGIC or size not in _DTYPES or len(data) != _HEAD.size + size * count:
        return None
    if zlib.crc32(memoryview(data)[8:]) != crc:
        return None
    if not count:
        return torch.empty(shape, dtype=_DTYPES[size])
    values = torch.frombuffer(data, dtype=_DTYPES[size], offset=_HEAD.size, count=count)
    return values.view(shape)


def folder_size(folder: Path) -> int:
    """Total bytes of the files below ``folder``."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may rename or remove files
                total += os.stat(os.path.join(path, name)).st_size
    return total
