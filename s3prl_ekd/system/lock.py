"""A lock on a folder, so that only one process at a time writes to it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from ..errors import SetupError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)  # another process holds the lock


class FolderLock:
    """Context manager that locks a folder for this process, or raises SetupError.

    It is a POSIX record lock. The operating system releases it when the process ends, even if
    killed, so that there are no stale locks. Unlike ``flock`` it is not inherited by DataLoader
    workers, which outlive a killed run by some seconds. It works across hosts if the shared file
    system supports locks; if not, a warning is logged.

    Args:
        folder: an existing folder.
        name: the lock file, for folders in which two kinds of work may run side by side.
        wait: seconds to wait for another process to release the lock.
    """

    def __init__(self, folder: str | Path, name: str = LOCK_FILE, wait: float = 0.0):
        self.folder, self.name, self.wait = Path(folder), name, wait
        self._file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        file = self._open()
        deadline = time.monotonic() + self.wait
        while True:
            try:
                _lock(file)
                break
            except OSError as error:
                if error.errno in _BUSY and time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                holder = _holder(file)
                file.close()
                if error.errno in _BUSY:
                    raise SetupError(
                        f"{self.folder} is in use: {holder} is writing to it; wait for it, stop "
                        "it, or name another folder"
                    ) from None
                logger.warning(
                    "cannot lock %s (%s): make sure that no other run writes to it",
                    self.folder,
                    error.strerror,
                )
                return self
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        # Do not write through a hard link (of a backup): that would change the other file.
        if os.fstat(file.fileno()).st_nlink == 1:
            with contextlib.suppress(OSError):  # a full disk: locked, but the holder is not named
                file.truncate(0)
                file.write(json.dumps(record) + "\n")
                file.flush()
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self._file.fileno()).st_nlink == 1:
                    self._file.truncate(0)  # not removed: another process may have opened it
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        """Open the lock file; not through a symlink, since its target would be emptied."""
        path = self.folder / self.name
        # O_NONBLOCK: else opening a named pipe would wait for its other end.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise SetupError(f"{path} must be a regular file: remove it")
        try:
            return open(os.open(path, flags, 0o666), "a+", encoding="utf-8")
        except OSError as error:
            raise SetupError(f"cannot write to {self.folder}: {error.strerror}") from None


def _lock(file: TextIO) -> None:
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(1 << 30)  # after the text: other processes cannot read locked bytes
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(file: TextIO) -> str:
    """Describe the process named in the lock file, whose contents may be damaged."""
    try:
        file.seek(0)
        record = json.loads(file.read(1000))
        pid, host, since = int(record["pid"]), str(record["host"])[:80], str(record["since"])[:20]
        return f"process {pid} on {host} (since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
