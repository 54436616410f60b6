"""Commands in processes that are forked from one that has imported torch and s3prl already.

The imports take seconds, and a downstream run is two commands or more. Python's fork server
(:mod:`multiprocessing`) imports once and forks for each command. Nothing else is shared: each child
begins where a new process would be after its imports, but for NumPy's BLAS, which stays with one
thread. With CUDA, under torchrun, outside Linux, on a Python whose fork server others can use and
in a checkout of s3prl (whose modules have other names) each command is a new process instead.
"""

from __future__ import annotations

import atexit
import io
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import cast

from ..system.jobs import Processes, end_with_parent
from . import SCRIPTS

logger = logging.getLogger(__name__)

PRELOAD = "s3prl_ekd.launch.forked_imports"
_THREADS = "OMP_NUM_THREADS"


def can_fork() -> bool:
    """Whether commands may be forked here."""
    import torch

    checkout = Path("run_downstream.py").is_file() and Path("hub.py").is_file()
    mended = has_private_server(sys.version_info[:3]) and sys.platform.startswith("linux")
    return mended and not torch.cuda.is_available() and not checkout


def has_private_server(version: tuple[int, ...]) -> bool:
    """Whether this Python's fork server obeys its own user only (CVE-2022-42919)."""
    return version >= (3, 11, 1) or (3, 10, 9) <= version < (3, 11)


def processes() -> Processes:
    """What starts commands: by forking where that can be done, else as new processes."""
    return ForkedProcesses() if can_fork() else Processes()


class ForkedProcesses(Processes):
    """Starts commands in forks of a process that has imported torch and s3prl."""

    def __init__(self) -> None:
        super().__init__()
        self._context: multiprocessing.context.ForkServerContext | None
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD])
        self._variable, self._threads = os.environ.get(_THREADS), _torch_threads()

    def call(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """See :meth:`Processes.call`; ``torchrun`` and other commands are never forked."""
        if words[0] not in SCRIPTS or self._context is None:
            return super().call(words, log, environment)
        with self._lock:
            self._check()
            child = self._fork(words, log, environment)
        if child is None:
            return super().call(words, log, environment)
        connection.wait([child.sentinel])
        with self._lock:
            self._live.discard(child)
            code = child.exitcode
        child.join()
        return code

    def _fork(self, words: Sequence[str], log: Path, environment: Mapping[str, str]):
        """The process; None where it cannot be started: then no later one is forked either."""
        if self._context is None:  # since another thread tried
            return None
        child = self._context.Process(
            target=_child,
            args=(
                list(words), os.path.abspath(log), dict(environment), os.getcwd(),
                multiprocessing.get_start_method(), self._threads_of(environment),
            ),
        )  # fmt: skip
        try:
            child.start()
        except (OSError, EOFError) as error:  # a TMPDIR too long for a socket, sockets forbidden
            self._context = None
            logger.warning("no command can be forked here (%s), so each imports torch anew", error)
            return None
        self._live.add(child)
        return child

    def _threads_of(self, environment: Mapping[str, str]) -> int:
        """How many threads torch would take in a new process."""
        wanted = environment.get(_THREADS)
        first = (wanted or "").partition(",")[0].strip()  # a list: for nested parallel regions
        if wanted != self._variable and first.isdecimal() and int(first) > 0:
            return int(first)
        return self._threads


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _child(
    words: list[str],
    log: str,
    environment: dict[str, str],
    folder: str,
    start_method: str,
    threads: int,
) -> None:
    """What ``python -m s3prl_ekd WORDS >> LOG 2>&1`` does after its imports."""
    # A child of a fork server starts its own children by such servers too; s3prl's twelve workers
    # for PR would each import everything again.
    multiprocessing.set_start_method(start_method, force=True)
    _print_to(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server's may ignore it
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # to be found anew, in this environment
    os.chdir(folder)
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    import torch

    end_with_parent()
    torch.set_num_threads(threads)  # the variable was read when torch was imported
    sys.argv = list(words)
    try:
        sys.exit(SCRIPTS[words[0]]())
    finally:
        atexit._run_exitfuncs()  # a forked child leaves without them


def _print_to(log: str) -> None:
    """Handlers of logging that were made by the imports hold the streams: these stay."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    # None: the descriptor was closed when the fork server began
    sys.stdout = out = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (till the end)
    sys.stderr = err = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    cast(io.TextIOWrapper, out).reconfigure(line_buffering=True)  # a log that can be watched
    cast(io.TextIOWrapper, err).reconfigure(line_buffering=True, errors="backslashreplace")
