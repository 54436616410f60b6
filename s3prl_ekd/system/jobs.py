"""Run commands of this package as child processes, several at once.

A command that is killed (``kill -9``, out of memory) cannot stop its children. A training run that
outlived it would write into the same folder as the next command's run. So each child ends itself
when its parent has ended: :func:`end_with_parent`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import EkdError, SetupError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PARENT = "S3PRL_EKD_PARENT"  # environment variable: the parent's process id
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 30.0  # time to save and end: from SIGINT to SIGTERM, from SIGTERM to SIGKILL


def child_command(argv: Sequence[str]) -> list[str]:
    """The argv of a child process that runs ``run_downstream.py ...``, ``superb ...``, ..."""
    return [sys.executable, "-m", "s3prl_ekd", *argv]


def typed(argv: Sequence[str]) -> str:
    """The command of a child process as a user types it."""
    script = argv[0].startswith(("run_", "torchrun"))
    return shlex.join(argv if script else ["s3prl-ekd", *argv])


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """``environment`` (default: ``os.environ``) with :data:`PARENT` set to this process."""
    return {**(os.environ if environment is None else environment), PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Start a thread that ends this process when its parent has ended.

    SIGTERM is sent first, so that a run of ``-u ekd`` saves its last step. :data:`PARENT` is
    removed from the environment: it is not the parent of this process's children. Does nothing if
    the process was not started by one of our commands, or on Windows.
    """
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal() and os.name == "posix":
        thread = threading.Thread(target=_end_after, args=(int(parent),), daemon=True)
        thread.start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    logger.warning("the parent process has ended; stopping")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SAVE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


class Jobs:
    """Starts child processes, and ends them on Ctrl-C.

    Each child is in a session (setsid) of its own, so a terminal's Ctrl-C reaches it once, through
    this process. A second one would end a training before it has saved.

    Args:
        slots: places for jobs that run at once.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._lock = threading.RLock()  # also taken by a signal handler
        self._children: set[subprocess.Popen] = set()
        self._stopped = False

    def run_all(
        self,
        job: Callable[[Item, dict[str, str]], Result],
        items: Sequence[Item],
        done: Callable[[Item], None] = lambda item: None,
    ) -> list[Result]:
        """Call ``job`` for each item in a thread, :attr:`slots` at once, with a progress bar.

        A job that fails with an :class:`EkdError` does not stop the others.

        Args:
            job: called with an item and the environment of its commands.
            items: in the order in which they are started.
            done: called in this thread after each job that succeeded.

        Returns:
            The results in the order of ``items``.

        Raises:
            SetupError: jobs failed; the message has all of their errors.
        """
        from tqdm import tqdm  # every command imports this module

        environments: queue.Queue[dict[str, str]] = queue.Queue()
        for slot in range(self.slots):
            environments.put(_slot_environment(slot, self.slots))

        def run_in_slot(item: Item) -> Result:
            environment = environments.get()
            try:
                return job(item, environment)
            finally:
                environments.put(environment)

        errors = []
        bar = tqdm(total=len(items), unit=" runs")
        with self._pause_with_parent(), bar, ThreadPoolExecutor(self.slots) as pool:
            futures = {pool.submit(run_in_slot, item): item for item in items}
            try:
                for future in as_completed(futures):
                    bar.update()
                    try:
                        future.result()
                        done(futures[future])
                    except EkdError as error:
                        errors.append(str(error))
                        tqdm.write(f"failed: {error}")
            except BaseException:
                for future in futures:
                    future.cancel()
                self.stop()
                raise
        if errors:
            raise SetupError(
                f"{len(errors)} of {len(items)} runs failed; fix the cause and repeat the command "
                f"(finished runs are kept): {'; '.join(errors)}"
            )
        return [future.result() for future in futures]

    def run(
        self,
        argv: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        stdin: bytes = b"",
        folder: Path | None = None,
    ) -> None:
        """Run one command in ``folder`` and append its output to ``log``.

        Raises:
            SetupError: the command failed; the message has its error and names the log.
        """
        with open(log, "ab") as file:
            offset = file.tell()
            code = self.call(argv, file, environment, stdin, folder)
        if code:
            reason = _reason(log.read_bytes()[offset:].decode("utf-8", "replace"), code)
            raise SetupError(f"{reason} (see {log})")

    def call(
        self,
        argv: Sequence[str],
        output: BinaryIO | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        folder: Path | None = None,
    ) -> int:
        """Run one command in ``folder`` and return its exit code; -N if signal N ended it.

        ``output`` is the file for stdout and stderr; None for those of this process.
        """
        with self._lock:
            if self._stopped:
                raise SetupError("stopped before this run started; give the same command again")
            child = subprocess.Popen(
                child_command(argv),
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
                # unbuffered: the log can be followed
                env={**child_environment(environment), "PYTHONUNBUFFERED": "1"},
            )
            self._children.add(child)
        try:
            with self._pause_with_parent():
                child.communicate(stdin)
        except BaseException:  # Ctrl-C, if this is the main thread
            self.stop()
            raise
        with self._lock:
            self._children.discard(child)
        return child.returncode

    def stop(self) -> None:
        """Start no further children, and end those that run: SIGINT, after some time SIGTERM."""
        self._stopped = True
        self._signal(signal.SIGINT)
        deadline = time.monotonic() + _SAVE_SECONDS
        try:
            while self._running() and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:  # also at a second Ctrl-C
            self._signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _pause_with_parent(self) -> Iterator[None]:
        """Within the block, Ctrl-Z pauses the children too, and ``fg`` continues them."""
        if os.name != "posix" or threading.current_thread() is not threading.main_thread():
            yield
            return

        def pause(number: int, frame: object) -> None:
            self._signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)  # returns when this process is continued
            self._signal(signal.SIGCONT)

        previous = signal.signal(signal.SIGTSTP, pause)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, previous)

    def _signal(self, number: int) -> None:
        for child in self._running():  # Windows has no SIGINT for another process
            child.send_signal(number if os.name == "posix" else signal.SIGTERM)

    def _running(self) -> list[subprocess.Popen]:
        with self._lock:
            return [child for child in self._children if child.poll() is None]


def _slot_environment(slot: int, slots: int) -> dict[str, str]:
    """Environment of the commands in a slot. With several slots, each gets one GPU and, unless
    ``OMP_NUM_THREADS`` is set, an equal share of the cores."""
    if slots == 1:
        return dict(os.environ)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots)), **os.environ}
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if count:
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return environment


def _reason(output: str, code: int) -> str:
    """The error that a failed command printed, else its last line and the signal that killed it."""
    lines = output.strip().splitlines() or ["no output"]
    # not always the last line: a progress bar may print after it when it is closed
    for line in reversed(lines):
        if line.startswith(("error: ", "stopped by ")):
            return line.removeprefix("error: ")
    if code > 0:
        return lines[-1]
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"killed by {name}; last line of output: {lines[-1]}"
