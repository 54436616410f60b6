"""Cache of downstream features on disk, one file of :mod:`..files.states_file` for each waveform.

Several processes may write the same file: each writes a temporary file and renames it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from ..files.states_file import read_states_file, states_path, write_states_file

logger = logging.getLogger(__name__)

_SPARE = 2 * 10**9  # bytes of the disk left free, for checkpoints and other users
_RECOUNT = 1 << 28  # bytes written by this process before the folder's size is counted again


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
        return states_path(self.folder, key)

    def read(self, key: str) -> Tensor | None:
        """Read ``[layer, frame, width]`` in float16 or float32; None if the file does not exist.

        A damaged file counts as missing, with a warning, and is overwritten later.
        """
        path = self.path(key)
        if not os.path.exists(path):  # False also where the folder cannot be read
            return None
        try:
            return read_states_file(path, "file of cached features")[0]
        except CheckpointError as error:
            logger.warning("%s; computing it again", error)
            return None

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
                    self.written += write_states_file(path, states, sync=False)[0]
                except FileNotFoundError:  # another `superb` run has ended and removed the folder
                    self.written += write_states_file(path, states, sync=False)[0]
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


def folder_size(folder: Path) -> int:
    """Total bytes of the files below ``folder``."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may rename or remove files
                total += os.stat(os.path.join(path, name)).st_size
    return total
