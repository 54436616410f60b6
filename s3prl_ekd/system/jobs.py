"""Start child commands, and end a child when its parent has ended.

A command that is killed (``kill -9``, out of memory) cannot stop its children. A training run
that outlived it would write into the same folder as the next command's run.
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

PARENT = "S3PRL_EKD_PARENT"  # environment variable: the parent's process id
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 30.0  # from SIGTERM to SIGKILL


def child_command(argv: Sequence[str]) -> list[str]:
    """The argv of a child process.

    Args:
        argv: ``run_downstream.py ...``, ``superb ...`` or ``torchrun ...``.
    """
    return [sys.executable, "-m", "s3prl_ekd", *argv]


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """``environment`` (default: ``os.environ``) with :data:`PARENT` set to this process."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Start a thread that ends this process when its parent has ended.

    SIGTERM is sent first, so that a run of ``-u ekd`` saves its last step. :data:`PARENT` is
    removed from the environment: it is not the parent of this process's children. Does nothing if
    the process was not started by one of our commands, or on Windows.
    """
    parent = multiprocessing.parent_process()
    parent_pid = os.environ.pop(PARENT, None)
    if parent is not None:  # forked

        def wait() -> None:
            connection.wait([parent.sentinel])

    elif parent_pid is not None and parent_pid.isdecimal() and os.name == "posix":

        def wait() -> None:
            while os.getppid() == int(parent_pid):
                time.sleep(_POLL_SECONDS)

    else:
        return
    threading.Thread(target=_end_after, args=(wait,), name="parent", daemon=True).start()


def _end_after(wait: Callable[[], object]) -> None:
    wait()
    logger.warning("the parent process has ended; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SAVE_SECONDS)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


_TO_INTERRUPT = 20.0  # seconds from SIGINT to SIGTERM
_GRACE = 2.0  # seconds before SIGINT: a terminal's Ctrl-C reaches the children anyway


class CommandRunner:
    """Run commands of ``python -m s3prl_ekd`` as child processes, from several threads."""

    def __init__(self) -> None:
        # One lock for starting and for reading exit codes: Popen also reaps other children, and if
        # two threads reap the same child, its exit code is lost.
        self._lock = threading.Lock()
        self._live: set = set()  # running children
        self._stopped = False

    def call(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Run ``run_downstream.py ...`` or ``torchrun ...``, and append its output to ``log``.

        Returns:
            The exit code; -N if signal N ended the process.
        """
        with open(log, "ab") as file, self._lock:
            self._check_stopped()
            child = subprocess.Popen(
                child_command(argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # unbuffered: the log can be followed
                env={**child_environment(environment), "PYTHONUNBUFFERED": "1"},
            )
            self._live.add(child)
        code = child.wait()
        with self._lock:
            self._live.discard(child)
        return code

    def _check_stopped(self) -> None:
        if self._stopped:
            raise SetupError("stopped before this run started; give the same command again")

    def stop(self) -> None:
        """Start no further children, and end those that run.

        SIGINT first, then SIGTERM: commands in the background of a shell script ignore SIGINT.
        """
        self._stopped = True
        for number, seconds in ((signal.SIGINT, _GRACE), (signal.SIGTERM, _TO_INTERRUPT)):
            deadline = time.monotonic() + seconds
            while self._live and time.monotonic() < deadline:
                time.sleep(0.05)
            with self._lock:
                for child in self._live:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, number)
