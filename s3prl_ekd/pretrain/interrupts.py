"""What ends a run early: signals, memory that runs out, workers that die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from types import FrameType
from typing import Any, TypeVar

import torch

from ..data.audio_files import SAMPLE_RATE
from ..data.batches import Batch
from ..data.loader import advice, shared_memory
from ..errors import SetupError
from ..system import torchrun

T = TypeVar("T")
# SIGTERM: kill, scancel, docker stop. SIGINT: Ctrl-C. SIGUSR1: sbatch --signal=USR1@SECONDS.
# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
TIMER = hasattr(signal, "setitimer")  # Windows has none: a batch is waited for to its end there
# One Ctrl-C can be delivered twice: by the terminal, and by a wrapper or torchrun that hands it on.
SAME_KEY = 0.5  # seconds
SAME_FROM_TORCHRUN = 5.0
# How long to wait for the next batch after a signal. One process can leave the step out; of several
# processes the others wait in it for this one, and one more step is saved if it is done.
LAST_BATCH = 1.0  # seconds
LAST_BATCH_OF_SEVERAL = 3.0

# In the errors of torch's allocators: CUDA, MPS, Linux and other CPUs.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


class StoppedWaiting(Exception):
    """After a signal, the next batch has not come in time."""


def exit_code(name: str) -> int:
    """The exit code of a process that the signal of that name has ended: 143, 130 or 138."""
    return 128 + int(signal.Signals[name])


class StopSignals:
    """A context in which a signal sets ``received``; the training loop reads it after each step.

    Waiting for a batch (:meth:`batches`) ends with StoppedWaiting. A second signal ends the process
    at once: KeyboardInterrupt for Ctrl-C, the signal's default otherwise; also while the main
    thread is in code that is not Python's, waiting for another process or for a disk. Outside the
    main thread, where Python has no signals, the context does nothing.

    Args:
        quiet: print nothing; of several processes one prints.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: signal.Signals | None = None
        self._handled_at = 0.0  # by the main thread
        self._seen_at: float | None = None  # by the watching thread
        self._announced = self._exiting = False
        self._waiting_since: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in SIGNALS}
            if TIMER:
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._check_waiting)
                pipe, self._pipe = os.pipe()
                os.set_blocking(self._pipe, False)
                self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(pipe,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for each in SIGNALS:
            signal.signal(each, self._before[each])
        if TIMER:
            if self.received is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before[signal.SIGALRM])
            signal.set_wakeup_fd(self._pipe_before)
            os.write(self._pipe, b"\0")
            os.close(self._pipe)
        self._before = {}

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over a loader.

        Raises:
            StoppedWaiting: a signal has come, and no batch in the seconds since.
        """
        with self._waiting():
            iterator = iter(loader)
        while True:
            with self._waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def waited(self) -> bool:
        """Whether a signal is so old that a process which waits for a batch has ended."""
        return self._seen_at is not None and time.monotonic() - self._seen_at > _last_batch()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that has just been forked
        now = time.monotonic()
        if self.received is None:
            self.received, self._handled_at = signal.Signals(number), now
            if TIMER:
                signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            self._announce(number)
        elif _is_second(now - self._handled_at):
            self._exit(number)

    def _announce(self, number: int) -> None:
        if self._announced or self.quiet:
            return
        self._announced = True
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        text = f"\n{signal.Signals(number).name}: saving after this step; {again} leaves at once\n"
        # Not print: a handler may come in the middle of another print to the same stream.
        os.write(2, text.encode())

    def _watch(self, pipe: int) -> None:
        """In a thread, read the numbers of signals as they arrive; :meth:`_handle` may be late."""
        while (number := os.read(pipe, 1)[0]) != 0:
            now = time.monotonic()
            if number not in SIGNALS:
                continue
            if self._seen_at is None:
                self._seen_at = now
                if not connection.wait([pipe], 0.5) and self.received is None:
                    self._announce(number)
            elif _is_second(now - self._seen_at):
                time.sleep(1)  # for the main thread to handle it
                if not self._exiting:
                    _kill_children()
                    os._exit(128 + number)
        os.close(pipe)

    def _exit(self, number: int) -> None:
        self._exiting = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        try:
            _kill_children()
        finally:
            os.kill(os.getpid(), number)

    def _check_waiting(self, number: int, frame: FrameType | None) -> None:
        """Every half second after a signal: raise StoppedWaiting if the next batch is late."""
        since = self._waiting_since
        if since is not None and time.monotonic() - max(since, self._handled_at) > _last_batch():
            raise StoppedWaiting


def _is_second(seconds: float) -> bool:
    """Whether a signal so long after the first one is a second one, and not the same again."""
    return seconds > (SAME_FROM_TORCHRUN if torchrun.several() else SAME_KEY)


def _last_batch() -> float:
    return LAST_BATCH_OF_SEVERAL if torchrun.several() else LAST_BATCH


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def memory_explained(step: int, batch: Batch, device: str, hint: str) -> Iterator[None]:
    """Turn "out of memory" into a sentence with the batch's size and what to lower.

    Args:
        step: number of the step, from 1.
        batch: the batch in use.
        device: of the run.
        hint: how to resume.

    Raises:
        SetupError: out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        count, samples = (*batch.waves.shape, 0)[:2]
        seconds = samples / SAMPLE_RATE
        raise SetupError(
            f"out of memory on {device} at step {step}: the batch has {count} utterances, padded "
            f"to {seconds:.1f} s each ({count * seconds:.0f} s in all); lower train_batch_size "
            f"(and raise gradient_accumulate_steps as much), or sequence_length; {hint}"
        ) from None


@contextlib.contextmanager
def workers_explained(hint: str) -> Iterator[None]:
    """Turn errors of the loader's worker processes into a sentence.

    Raises:
        SetupError: a worker died, or they gave no batch for the loader's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        late = re.search(r"DataLoader timed out after (\S+) seconds", message)
        if late:
            raise SetupError(
                f"the processes that read audio gave no batch for {float(late[1]):g} s: the disk "
                f"does not answer, or shared memory is full ({shared_memory()}); see that "
                f"libri_root can be read; or {advice()}; for a disk that is only slow, raise "
                f"pretrain_expert.datarc.loader_timeout; {hint}"
            ) from None
        if "DataLoader worker" not in message:
            raise
        if "Bus error" in message:
            raise SetupError(
                f"a process that reads audio has no shared memory left ({shared_memory()}): "
                f"{advice()}; {hint}"
            ) from None
        raise SetupError(
            f"a process that reads audio was killed ({error}): often the machine's memory is full; "
            f"lower pretrain_expert.datarc.num_workers; {hint}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
