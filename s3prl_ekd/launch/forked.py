"""Run commands in forks of a process that has imported torch and s3prl already.

The imports take seconds, and a downstream run is two commands or more. Python's fork server
(:mod:`multiprocessing`) imports once and forks for each command. Nothing else is shared: a child
has the state of a new process after its imports, except that NumPy's BLAS keeps one thread. With
CUDA, under torchrun, outside Linux, with a Python whose fork server accepts requests of other
users, and in a checkout of s3prl (where modules have other names), each command starts a new
process instead.
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

from ..system.jobs import CommandRunner, end_with_parent
from . import SCRIPTS

logger = logging.getLogger(__name__)

PRELOAD = "s3prl_ekd.launch.forked_imports"
_THREADS = "OMP_NUM_THREADS"


def can_fork() -> bool:
    """Whether commands can be forked on this machine and in this folder."""
    import torch

    checkout = Path("run_downstream.py").is_file() and Path("hub.py").is_file()
    linux = sys.platform.startswith("linux")
    safe = linux and has_private_server(sys.version_info[:3])
    return safe and not torch.cuda.is_available() and not checkout


def has_private_server(version: tuple[int, ...]) -> bool:
    """Whether this Python's fork server rejects other users (CVE-2022-42919)."""
    return version >= (3, 11, 1) or (3, 10, 9) <= version < (3, 11)


def command_runner() -> CommandRunner:
    """A runner of commands: by forking if possible, else as new processes."""
    return ForkServerRunner() if can_fork() else CommandRunner()


class ForkServerRunner(CommandRunner):
    """Run commands in forks of a process that has imported torch and s3prl."""

    def __init__(self) -> None:
        super().__init__()
        self._context: multiprocessing.context.ForkServerContext | None
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD])
        self._omp_threads, self._threads = os.environ.get(_THREADS), _torch_threads()

    def call(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """See :meth:`CommandRunner.call`; only s3prl's scripts are forked."""
        if argv[0] not in SCRIPTS or self._context is None:
            return super().call(argv, log, environment)
        with self._lock:
            self._check_stopped()
            child = self._fork(argv, log, environment)
        if child is None:
            return super().call(argv, log, environment)
        connection.wait([child.sentinel])
        with self._lock:
            self._live.discard(child)
            code = child.exitcode
        child.join()
        return code

    def _fork(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]):
        """Fork a child process; None if that fails, and then no later command is forked either."""
        if self._context is None:  # forking has failed in another thread
            return None
        child = self._context.Process(
            target=_child,
            args=(
                list(argv), os.path.abspath(log), dict(environment), os.getcwd(),
                multiprocessing.get_start_method(), self._threads_of(environment),
            ),
        )  # fmt: skip
        try:
            child.start()
        except (OSError, EOFError) as error:  # TMPDIR too long for a socket path, or no sockets
            self._context = None
            logger.warning("cannot fork (%s): each command starts a new process", error)
            return None
        self._live.add(child)
        return child

    def _threads_of(self, environment: Mapping[str, str]) -> int:
        """The number of threads that torch would use in a new process."""
        value = environment.get(_THREADS)
        outer = (value or "").partition(",")[0].strip()  # a list is for nested parallel regions
        if value != self._omp_threads and outer.isdecimal() and int(outer) > 0:
            return int(outer)
        return self._threads


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _child(
    argv: list[str],
    log: str,
    environment: dict[str, str],
    folder: str,
    start_method: str,
    threads: int,
) -> None:
    """Do what ``python -m s3prl_ekd ARGV >> LOG 2>&1`` does after its imports."""
    # In a child of a fork server the default start method is a fork server too: each of s3prl's
    # twelve workers for PR would import everything again.
    multiprocessing.set_start_method(start_method, force=True)
    _redirect_output(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server may ignore SIGINT
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # cached by the server; look it up in this environment
    os.chdir(folder)
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    import torch

    end_with_parent()
    torch.set_num_threads(threads)  # torch read OMP_NUM_THREADS at import, in the server
    sys.argv = list(argv)
    try:
        sys.exit(SCRIPTS[argv[0]]())
    finally:
        atexit._run_exitfuncs()  # multiprocessing children skip atexit functions


def _redirect_output(log: str) -> None:
    """Append stdout and stderr to ``log``, by descriptor.

    The stream objects stay: logging handlers created by the imports hold them.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    # None: the descriptor was closed when the fork server started
    sys.stdout = out = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 (until exit)
    sys.stderr = err = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    cast(io.TextIOWrapper, out).reconfigure(line_buffering=True)  # the log can be followed
    cast(io.TextIOWrapper, err).reconfigure(line_buffering=True, errors="backslashreplace")
