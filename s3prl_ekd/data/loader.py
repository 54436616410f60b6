"""A DataLoader whose worker processes end with the run, however it ends."""

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

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import SetupError

SHARED_MEMORY = "/dev/shm"  # where Linux has it
GRACE = 1.0  # seconds for workers to end by themselves; the batch they read is discarded

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # of all loaders


class BatchLoader(DataLoader):
    """torch's DataLoader for worker processes that ignore SIGTERM, as those of a run do.

    torch and Python end workers with SIGTERM, and Python then waits for them without a limit when
    the main process exits. Here they are killed: they have no state.

    Args:
        dataset: see DataLoader.
        timeout: seconds without a batch from the workers until a RuntimeError says so; 0 waits for
            ever.
        **options: see DataLoader.

    Raises:
        SetupError: on iterating: worker processes cannot be started.
    """

    dataset: Any  # a DistillationDataset
    sampler: Any  # a FixedOrder or an EpochOrder

    def __init__(self, dataset: Dataset, *, timeout: float = 0.0, **options: Any):
        # torch refuses one where the main process reads
        super().__init__(dataset, timeout=timeout if options.get("num_workers") else 0, **options)
        self._iterators: weakref.WeakSet = weakref.WeakSet()
        self._started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    def __iter__(self) -> Any:
        atexit.unregister(_end_all)
        atexit.register(_end_all)  # before what multiprocessing and torch do at exit
        try:
            if self.num_workers:
                # Semaphores lie in shared memory. Where there is no room, torch's iterator would be
                # left half made and end in a traceback of its own.
                _ = [multiprocessing.Lock() for _ in range(4 * self.num_workers + 8)]
            batches = super().__iter__()
        except OSError as error:
            raise SetupError(
                f"cannot start the {self.num_workers} processes that read audio: {error.strerror}; "
                f"{shared_memory()}; {advice()}"
            ) from None
        self._iterators.add(batches)
        for worker in getattr(batches, "_workers", ()):
            self._started.add(worker)
            _workers.add(worker)
        return batches

    def close(self, limit: float = GRACE) -> None:
        """End the worker processes, those that do not end within ``limit`` seconds by force.

        The loader can be iterated over again, with new ones.
        """
        iterators = [
            batches for batches in self._iterators if hasattr(batches, "_shutdown_workers")
        ]
        # In threads: torch waits for each worker in turn, and for its pinning without a limit.
        threads = [
            threading.Thread(target=batches._shutdown_workers, daemon=True) for batches in iterators
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + limit
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        children = (each for each in multiprocessing.active_children() if each in self._started)
        _kill(children, threads)
        self._iterator = None  # of persistent workers
        self._iterators.clear()


@contextlib.contextmanager
def workers_end() -> Iterator[None]:
    """For s3prl's own loaders: kill their workers when the run fails, so that it need not wait."""
    try:
        yield
    except BaseException:
        _kill(multiprocessing.active_children())
        raise


def _kill(children: Iterable[BaseProcess], waiting: Iterable[threading.Thread] = ()) -> None:
    """Kill processes. ``waiting`` are threads that join them already: one thread alone may reap a
    process, so these are waited for first."""
    children = list(children)
    with _deaths_unseen():
        for child in children:
            child.kill()
        for thread in waiting:
            thread.join(1)
        for child in children:
            child.join(1)


@contextlib.contextmanager
def _deaths_unseen() -> Iterator[None]:
    """Keep torch's handler from raising an error for a worker that is killed on purpose."""
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end_all() -> None:
    """What is left at exit: of s3prl's own Runner, for example, which closes nothing."""
    _kill(child for child in multiprocessing.active_children() if child in _workers)


def share(tensors: Iterable[Tensor]) -> None:
    """Move a batch into shared memory, in a worker process, as sending it would.

    But a worker that finds no room while it sends a batch only prints so, and the run would wait.

    Raises:
        SetupError: there is no room.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise SetupError(
            f"no shared memory for a batch: {shared_memory()}; {advice()} ({first})"
        ) from None


def shared_memory() -> str:
    """How much of it there is, in words."""
    try:
        room = os.statvfs(SHARED_MEMORY)
    except (AttributeError, OSError):
        return f"{SHARED_MEMORY} is not there"
    free, whole = (count * room.f_frsize / 1e6 for count in (room.f_bavail, room.f_blocks))
    return f"{SHARED_MEMORY} has {free:,.1f} MB free of {whole:,.1f} MB"


def advice() -> str:
    """What to do where it is too small."""
    return (
        f"make {SHARED_MEMORY} larger (docker run --shm-size=16g), or read audio in the main "
        "process: pretrain_expert.datarc.num_workers: 0 (run_pretrain.py -o "
        '"config.pretrain_expert.datarc.num_workers=0")'
    )
