"""A DataLoader whose worker processes are ended together with the run, even if it fails."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..errors import SetupError

SHARED_MEMORY = "/dev/shm"  # on Linux
GRACE = 1.0  # seconds that workers get to exit by themselves; their current batch is discarded

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # of all loaders


class BatchLoader(DataLoader):
    """torch's DataLoader for worker processes that ignore SIGTERM, as the workers of a run do.

    torch and Python end workers with SIGTERM, and at exit Python waits for them without a limit.
    This class kills them instead, which is safe because they have no state.

    Args:
        timeout: seconds to wait for a batch from the workers before raising RuntimeError; 0: no
            limit.
        options: those of DataLoader.

    Raises:
        SetupError: on iterating: the worker processes cannot be started.
    """

    dataset: Any  # a DistillationDataset
    sampler: Any  # a FixedOrderSampler or an EpochSampler

    def __init__(self, dataset: Dataset, *, timeout: float = 0.0, **options: Any):
        # torch rejects a timeout without workers
        super().__init__(dataset, timeout=timeout if options.get("num_workers") else 0, **options)
        self._iterators: weakref.WeakSet = weakref.WeakSet()
        self._started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    def __iter__(self) -> Any:
        # Registered last, so that it runs before the exit handlers of multiprocessing and torch.
        atexit.unregister(_kill_remaining_workers)
        atexit.register(_kill_remaining_workers)
        try:
            if self.num_workers:
                # Semaphores are allocated in shared memory. Without this test, torch's iterator
                # would fail half initialised, with a second traceback when it is deleted.
                _ = [multiprocessing.Lock() for _ in range(4 * self.num_workers + 8)]
            batches = super().__iter__()
        except OSError as error:
            raise SetupError(
                f"cannot start the {self.num_workers} processes that read audio: {error.strerror}; "
                f"{shared_memory_usage()}; {shared_memory_advice()}"
            ) from None
        self._iterators.add(batches)
        for worker in getattr(batches, "_workers", ()):
            self._started.add(worker)
            _workers.add(worker)
        return batches

    def close(self, limit: float = GRACE) -> None:
        """End the worker processes; kill those that are still running after ``limit`` seconds.

        The loader can be iterated over again; it then starts new workers.
        """
        # In threads: torch waits for one worker after another, and for its pin-memory thread
        # without a limit.
        threads = [
            threading.Thread(target=batches._shutdown_workers, daemon=True)
            for batches in self._iterators
            if hasattr(batches, "_shutdown_workers")
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + limit
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        children = multiprocessing.active_children()
        _kill([child for child in children if child in self._started], threads)
        self._iterator = None  # torch keeps it for persistent workers
        self._iterators.clear()


@contextlib.contextmanager
def kill_workers_on_error() -> Iterator[None]:
    """Kill all child processes if the block raises, so that exit need not wait for them.

    For s3prl's own loaders, which do not end their workers.
    """
    try:
        yield
    except BaseException:
        _kill(multiprocessing.active_children())
        raise


def _kill(children: Iterable[BaseProcess], waiting: Iterable[threading.Thread] = ()) -> None:
    """Kill processes and join them.

    Threads that are ``waiting`` for the same processes are joined first, because only one thread
    can reap a process.
    """
    children = list(children)
    with _without_sigchld_handler():
        for child in children:
            child.kill()
        for thread in waiting:
            thread.join(1)
        for child in children:
            child.join(1)


@contextlib.contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Keep torch's SIGCHLD handler from raising an error for a worker that we kill."""
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, previous)


def _kill_remaining_workers() -> None:
    """Kill workers that are still running at exit, e.g. because s3prl's Runner closes no loader."""
    _kill(child for child in multiprocessing.active_children() if child in _workers)


def shared_memory_usage() -> str:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):
        return f"{SHARED_MEMORY} does not exist"
    free, total = (count * status.f_frsize / 1e6 for count in (status.f_bavail, status.f_blocks))
    return f"{SHARED_MEMORY} has {free:,.1f} MB free of {total:,.1f} MB"


def shared_memory_advice() -> str:
    return (
        f"enlarge {SHARED_MEMORY} (docker run --shm-size=16g), or read audio in the main process "
        "with pretrain_expert.datarc.num_workers: 0 (run_pretrain.py -o "
        '"config.pretrain_expert.datarc.num_workers=0")'
    )
