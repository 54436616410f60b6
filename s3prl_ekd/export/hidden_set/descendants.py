"""End a process with all that it has started, also what has left its session (on Linux)."""

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

# of <linux/prctl.h>
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37
_PATIENCE = 10.0  # seconds in which killed processes must be gone


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it, processes that lose their parent become children of this one, where
    :func:`end` finds them, and this one's memory and environment cannot be read by them.

    Without effect where there is no Linux.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before = ctypes.c_int()
    prctl(_GET_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    dumpable = prctl(_GET_DUMPABLE, 0, 0, 0, 0)
    prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SET_DUMPABLE, dumpable, 0, 0, 0)
        prctl(_SET_SUBREAPER, before.value, 0, 0, 0)


def end(process: subprocess.Popen, started: int) -> list[int]:
    """Kill ``process``, its session, and within :func:`guarded` all that it has started.

    Args:
        process: the leader of a session.
        started: :func:`start_time` of it; what this process had started before is not touched.

    Returns:
        Those that could not be ended in time, by number.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    deadline = time.monotonic() + _PATIENCE
    while True:
        # Each that dies hands its children up to this process: they come in the next round.
        orphans = [pid for pid in _children() if pid != process.pid and start_time(pid) >= started]
        if not orphans or time.monotonic() > deadline:
            return orphans
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def start_time(pid: int) -> int:
    """When a process was started, in clock ticks of the system; 0 if that is not known."""
    fields = _fields(pid)
    return int(fields[19]) if fields else 0


def _children() -> list[int]:
    if sys.platform != "linux":
        return []
    own = str(os.getpid())
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (fields := _fields(pid)) and fields[1] == own]


def _fields(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the name: state, parent, ...; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
