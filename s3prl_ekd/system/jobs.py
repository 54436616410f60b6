"""Processes that a command starts end with it, however it ends.

A command that is killed (``kill -9``, out of memory) cannot stop what it has started. A training
that lived on would write into its folder beside the one that the next command starts there.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

from ..errors import SetupError

logger = logging.getLogger(__name__)

PARENT = "S3PRL_EKD_PARENT"  # environment: the process whose end is this one's, too
_LOOK_EVERY = 0.5  # seconds
_TO_SAVE = 30.0  # seconds from SIGTERM to SIGKILL


def child_command(argv: Sequence[str]) -> list[str]:
    """The command of a process for one of our commands, or for ``torchrun``, as a list.

    Args:
        argv: ``run_downstream.py ...``, ``superb ...`` or ``torchrun ...``.
    """
    return [sys.executable, "-m", "s3prl_ekd", *argv]


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of such a process: ``environment`` (default: ours), and who its parent is."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """End this process when the one that started it has ended; without such a one, do nothing.

    SIGTERM comes first, so that a run of ``-u ekd`` saves its last step. The variable is removed
    from the environment, so that processes which this one starts do not watch for the same parent.
    Windows does not show a parent's end, and nothing is done there.
    """
    forked = multiprocessing.parent_process()
    number = os.environ.pop(PARENT, None)
    if forked is not None:

        def wait() -> None:
            connection.wait([forked.sentinel])

    elif number is not None and number.isdecimal() and os.name == "posix":

        def wait() -> None:
            while os.getppid() == int(number):
                time.sleep(_LOOK_EVERY)

    else:
        return
    threading.Thread(target=_end_after, args=(wait,), name="parent", daemon=True).start()


def _end_after(wait: Callable[[], object]) -> None:
    wait()
    logger.warning("the process that started this one has ended; this one ends, too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_SAVE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


_TO_INTERRUPT = 20.0  # seconds for a command to end after Ctrl-C
_GRACE = 2.0  # seconds for children to leave by themselves: a terminal's Ctrl-C reaches them too


class Processes:
    """Starts commands of ``python -m s3prl_ekd`` and waits for them, from several threads."""

    def __init__(self) -> None:
        # One lock for starting and for asking how a child ended: starting one also reaps the
        # others, and two threads that reap the same child would lose its exit code.
        self._lock = threading.Lock()
        self._live: set = set()
        self._stopped = False

    def call(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Run ``run_downstream.py ...`` or ``torchrun ...``; its output is appended to ``log``.

        Returns:
            The exit code; below 0: the signal that ended it.
        """
        with open(log, "ab") as file, self._lock:
            self._check()
            child = subprocess.Popen(
                child_command(argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # a log that can be watched
                env={**child_environment(environment), "PYTHONUNBUFFERED": "1"},
            )
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        return code

    def _check(self) -> None:
        if self._stopped:
            raise SetupError("stopped before it began; give the same command again")

    def stop(self) -> None:
        """Start nothing any more, and interrupt what still runs after a moment; what does not heed
        it, as commands do that were begun in the background of a script, is terminated."""
        self._stopped = True
        for what, grace in ((signal.SIGINT, _GRACE), (signal.SIGTERM, _TO_INTERRUPT)):
            deadline = time.monotonic() + grace
            while self._live and time.monotonic() < deadline:
                time.sleep(0.05)
            with self._lock:
                for child in self._live:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, what)
