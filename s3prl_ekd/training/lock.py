"""One run a folder: a second process is told who writes there."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from ..errors import SetupError

logger = logging.getLogger(__name__)

NAME = ".lock"


class FolderLock:
    """Hold a run's folder for as long as the context lasts, and no longer than the process lives.

    A POSIX record lock belongs to one process. It is gone when the process is, however that ended,
    so no stale lock has to be removed by hand; and unlike ``flock`` it does not go over to
    DataLoader workers, which live on for some seconds after a kill. It holds across hosts where the
    shared file system has locks; where it has none, a warning says so.

    Args:
        folder: exists.

    Raises:
        SetupError: on entering: another process holds it (its number and host are said), or the
            folder cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        try:
            file = open(self.folder / NAME, "a+", encoding="utf-8")
        except OSError as error:
            raise SetupError(f"cannot write into {self.folder}: {error.strerror}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(file)
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise SetupError(
                    f"{self.folder} is in use: {holder} is writing to it; wait for it, stop it, or "
                    "give this run another name"
                ) from None
            logger.warning(
                "no lock on %s (%s): see yourself that no second run writes to it",
                self.folder,
                error.strerror,
            )
            return self
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        file.truncate(0)
        file.write(json.dumps(me) + "\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.truncate(0)  # the file stays: removing it could take another's lock away
            self._file.close()
            self._file = None


def _read(file: TextIO) -> str:
    """Who wrote the file, in words; it is only a file, so it may hold anything."""
    try:
        file.seek(0)
        told = json.loads(file.read(1000))
        pid, host, since = int(told["pid"]), str(told["host"])[:80], str(told["since"])[:20]
        return f"process {pid} on {host} (since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
