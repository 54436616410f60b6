"""Cache of downstream features on disk, one safetensors file for each waveform.

The tensor ``states`` has the hidden states in float16, or in float32 if a value exceeds float16's
65504 or is not finite; the metadata has a CRC. File names depend on the samples only. Several
processes may write the same file: each writes a temporary file and renames it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import zlib
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files.atomic import atomic_file
from ..files.safetensors_file import SUFFIX, raw_bytes, read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

_FLOAT16_MAX = 65504.0
_SPARE = 2 * 10**9  # bytes of the disk left free, for checkpoints and other users
_RECOUNT = 1 << 28  # bytes written by this process before the folder's size is counted again


def wave_key(wave: Tensor) -> str:
    """Hash of a waveform ``[sample]`` and its length."""
    digest = hashlib.blake2b(f"{wave.numel()} ".encode(), digest_size=16)
    digest.update(raw_bytes(wave.float()))
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
        return self.folder / key[:2] / f"{key[2:]}{SUFFIX}"

    def read(self, key: str) -> Tensor | None:
        """Read ``[layer, frame, width]`` in float16 or float32; None if the file does not exist.

        A damaged file counts as missing, with a warning, and is overwritten later.
        """
        path = self.path(key)
        if not os.path.exists(path):  # False also where the folder cannot be read
            return None
        try:
            metadata, tensors = read_safetensors(path, "file of cached features")
        except CheckpointError as error:
            logger.warning("%s; computing it again", error)
            return None
        states = tensors.get("states")
        if states is None or metadata.get("crc") != _crc(states):
            logger.warning("%s is damaged; computing it again", path)
            return None
        return states

    def write(self, key: str, states: Tensor) -> None:
        """Store ``[layer, frame, width]``; without space left, warn once and store nothing more."""
        if self._full:
            return
        path, states = self.path(key), states.detach().cpu().contiguous()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            problem = self._space_problem(states.nbytes)
            if not problem:
                try:
                    self.written += _put(states, path)
                except FileNotFoundError:  # another `superb` run has ended and removed the folder
                    self.written += _put(states, path)
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror}"
        if problem:
            self._full = True
            logger.warning("%s; caching no more features", problem)

    def _space_problem(self, size: int) -> str:
        """Reserve ``size`` bytes; describe why that is not possible."""
        free = shutil.disk_usage(self.root).free
        if free - size < _SPARE:
            return f"only {free / 1e9:.1f} GB are free on the disk of {self.root}"
        if self._size is None or self._since_count >= _RECOUNT:
            self._size, self._since_count = folder_size(self.root), 0
        if self._size + size > self._limit:
            return (
                f"{self.root} has reached {self._size / 1e9:.1f} GB, the limit of "
                "--cache-features-gb"
            )
        self._size += size
        self._since_count += size
        return ""


def _put(states: Tensor, path: Path) -> int:
    """Write a file; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as file:  # the CRC detects a truncated file
        write_safetensors(file, {"states": states}, {"crc": _crc(states)})
        return file.tell()


def _crc(states: Tensor) -> str:
    """CRC-32 of dtype, shape and values."""
    start = zlib.crc32(f"{states.dtype} {tuple(states.shape)}".encode())
    return f"{zlib.crc32(raw_bytes(states), start):08x}"


def folder_size(folder: Path) -> int:
    """Total bytes of the files below ``folder``."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may rename or remove files
                total += os.stat(os.path.join(path, name)).st_size
    return total
