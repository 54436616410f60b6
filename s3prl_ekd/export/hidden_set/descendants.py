"""Kill a process and its descendants, on Linux also those that have left its session."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# from <linux/prctl.h>
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37
_KILL_TIMEOUT = 10.0  # seconds


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """Become the subreaper of orphaned descendants, so that :func:`kill_tree` finds them.

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


def kill_tree(process: subprocess.Popen, started: int) -> list[int]:
    """Kill ``process``, its session and, within :func:`adopt_orphans`, all its descendants.

    Args:
        process: leader of a session.
        started: its :func:`start_time`; children of this process that started earlier are left.

    Returns:
        Process ids that are still alive after a timeout.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    deadline = time.monotonic() + _KILL_TIMEOUT
    while True:
        # Children of a killed process become children of this one: the next round kills them.
        orphans = [pid for pid in _children() if pid != process.pid and start_time(pid) >= started]
        if not orphans or time.monotonic() > deadline:
            return orphans
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if unknown."""
    fields = _fields(pid)
    return int(fields[19]) if fields else 0


def _children() -> list[int]:
    if sys.platform != "linux":
        return []
    parent = str(os.getpid())
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (fields := _fields(pid)) and fields[1] == parent]


def _fields(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` after the name: state, parent, ...; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
