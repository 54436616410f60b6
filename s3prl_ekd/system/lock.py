"""One process a folder: the second one is told who writes there."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import time
from pathlib import Path
from typing import TextIO

from ..errors import SetupError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)  # another process holds it


class FolderLock:
    """Hold a folder for as long as the context lasts, and no longer than the process lives.

    A POSIX record lock belongs to one process. The system releases it when that process ends,
    killed or not, so no stale lock has to be removed by hand; and unlike ``flock`` it is not
    inherited by DataLoader workers, which outlive a killed run by some seconds. It holds across
    hosts where the shared file system has locks; where it has none, a warning says so.

    Args:
        folder: exists.
        name: of the lock's file, for a folder in which two kinds of work do not disturb each other.
        wait: seconds to wait for a process that holds it.

    Raises:
        SetupError: on entering: another process holds it (its number and host are named), the
            folder cannot be written, or the lock's file is a link or no plain file.
    """

    def __init__(self, folder: str | Path, name: str = NAME, wait: float = 0.0):
        self.folder = Path(folder)
        self.path = self.folder / name
        self.wait = wait
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
                        "it, or give this run another name"
                    ) from None
                logger.warning(
                    "no lock on %s (%s): make sure that no second run writes to it",
                    self.folder,
                    error.strerror,
                )
                return self
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        # A second name, which a backup by hard links gives: its contents are not ours to change.
        if os.fstat(file.fileno()).st_nlink == 1:
            with contextlib.suppress(OSError):  # a full disk: locked all the same, without a name
                file.truncate(0)
                file.write(json.dumps(owner) + "\n")
                file.flush()
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self._file.fileno()).st_nlink == 1:
                    self._file.truncate(0)  # it stays: removing it could remove another's lock
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        """The lock's file: never what a link leads to, which would be emptied."""
        # O_NONBLOCK: opening a named pipe would wait for a reader.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            handle = os.open(self.path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise SetupError(
                    f"{self.path} is a link; a lock is a plain file, remove it"
                ) from None
            raise SetupError(f"cannot write into {self.folder}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise SetupError(f"{self.path} is not a plain file, as a lock is; remove it")
        return open(handle, "a+", encoding="utf-8")


def _lock(file: TextIO) -> None:
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(1 << 30)  # beyond the text, which others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def _holder(file: TextIO) -> str:
    """The process that the file names, in words; the contents may be anything."""
    try:
        file.seek(0)
        owner = json.loads(file.read(1000))
        pid, host, since = int(owner["pid"]), str(owner["host"])[:80], str(owner["since"])[:20]
        return f"process {pid} on {host} (since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
