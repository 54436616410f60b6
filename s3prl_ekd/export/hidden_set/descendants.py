"""Run a process and kill it with its descendants, on Linux also those that left its session."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# from <linux/prctl.h>
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37
_KILL_TIMEOUT = 10.0  # seconds


@contextlib.contextmanager
def killed_on_exit(start: Callable[[], subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen]:
    """Start a process; on exit kill it, its session and, on Linux, all its descendants.

    Args:
        start: starts the process, as the leader of a new session.
    """
    with _adopt_orphans():
        others = _children()
        process = start()
        try:
            yield process
        finally:
            _kill_tree(process, others)


@contextlib.contextmanager
def _adopt_orphans() -> Iterator[None]:
    """Become the subreaper of orphaned descendants: they become children of this process.

    Also makes this process non-dumpable: they cannot read its memory and environment. Both are
    undone on exit. No effect except on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    subreaper = ctypes.c_int()
    prctl(_GET_SUBREAPER, ctypes.byref(subreaper), 0, 0, 0)
    dumpable = prctl(_GET_DUMPABLE, 0, 0, 0, 0)
    prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SET_DUMPABLE, dumpable, 0, 0, 0)
        prctl(_SET_SUBREAPER, subreaper.value, 0, 0, 0)


def _kill_tree(process: subprocess.Popen, others: set[int]) -> None:
    """Kill the session of ``process``, then the children of this process except ``others``."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    deadline = time.monotonic() + _KILL_TIMEOUT
    # Children of a killed process become children of this one: the next round kills them.
    while orphans := _children() - others:
        if time.monotonic() > deadline:
            logger.warning("processes of the package could not be killed: %s", sorted(orphans))
            return
        for pid in orphans:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _children() -> set[int]:
    """Process ids of the children of this process; empty except on Linux."""
    children = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = path.read_text().rpartition(")")[2].split()[1]  # state, parent, ...
            if parent == str(os.getpid()):
                children.add(int(path.parent.name))
    return children
