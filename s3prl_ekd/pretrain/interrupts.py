"""Interruptions of a run: signals, out of memory, data loader workers that die or hang."""

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
from ..data.batch import Batch
from ..data.loader import shared_memory_advice, shared_memory_usage
from ..errors import SetupError
from ..system import torchrun

T = TypeVar("T")
# SIGTERM: kill, scancel, docker stop. SIGINT: Ctrl-C. SIGUSR1: sbatch --signal=USR1@SECONDS.
# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
HAS_TIMER = hasattr(signal, "setitimer")  # not on Windows: no limit there on the wait for a batch
# A signal within this time counts as the first one delivered twice, e.g. Ctrl-C by the terminal
# and by torchrun or a wrapper that forwards it.
SAME_SIGNAL = 0.5  # seconds
SAME_SIGNAL_DISTRIBUTED = 5.0
# How long to wait for the next batch after a signal. A single process can drop the step. With
# several processes the wait is longer: the others may already wait for this one in the same step.
BATCH_WAIT = 1.0  # seconds
BATCH_WAIT_DISTRIBUTED = 3.0


class StoppedWaiting(Exception):
    """After a signal, the next batch has not arrived in time."""


class StoppedDevLoss(Exception):
    """After a signal, the dev loss is not measured to the end."""


def exit_code(name: str) -> int:
    """The exit code for the signal of that name: 143 (SIGTERM), 130 (SIGINT), 138 (SIGUSR1)."""
    return 128 + int(signal.Signals[name])


class StopSignals:
    """Context in which a signal sets ``received``; the training loop reads it after each step.

    A wait for a batch (:meth:`batches`) ends with StoppedWaiting soon after the signal. A second
    signal ends the process at once, with KeyboardInterrupt for Ctrl-C and the signal's default
    action otherwise. It does so even while the main thread is in native code, waiting for another
    process or a disk. Outside the main thread, where Python cannot handle signals, the context does
    nothing.

    ``received`` is the first signal, or None. With ``quiet`` nothing is printed, as only one of
    several processes prints.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: signal.Signals | None = None
        self._handled_at = 0.0  # when the main thread handled the first signal
        self._seen_at: float | None = None  # when the watching thread read it
        self._announced = self._exiting = False
        self._waiting_since: float | None = None
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {name: signal.signal(name, self._handle) for name in SIGNALS}
            if HAS_TIMER:
                alarm = signal.SIGALRM
                self._old_handlers[alarm] = signal.signal(alarm, self._check_waiting)
                pipe, self._pipe = os.pipe()
                os.set_blocking(self._pipe, False)
                self._old_wakeup_fd = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(pipe,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._old_handlers:
            return
        for number in SIGNALS:  # before the timer ends: a signal would start it again
            signal.signal(number, self._old_handlers[number])
        if HAS_TIMER:
            if self.received is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._old_handlers[signal.SIGALRM])
            signal.set_wakeup_fd(self._old_wakeup_fd)
            os.write(self._pipe, b"\0")
            os.close(self._pipe)
        self._old_handlers = {}

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over a loader.

        Raises StoppedWaiting if a signal has arrived, and no batch within the wait after it.
        """
        with self._waiting():
            iterator = iter(loader)
        while True:
            with self._waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def is_batch_overdue(self) -> bool:
        """Whether the wait for a batch after a signal is over, so that another process that
        was waiting for a batch has ended."""
        return self._seen_at is not None and time.monotonic() - self._seen_at > _batch_wait()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # in a worker just after the fork
        now = time.monotonic()
        if self.received is None:
            self.received, self._handled_at = signal.Signals(number), now
            if HAS_TIMER:
                signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
            self._announce(number)
        elif _is_new_signal(now - self._handled_at):
            self._exit(number)

    def _announce(self, number: int) -> None:
        if self._announced or self.quiet:
            return
        self._announced = True
        second = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        text = f"\n{signal.Signals(number).name}: saving after this step; {second} exits at once\n"
        # Not print(): a handler may interrupt another print to the same stream.
        os.write(2, text.encode())

    def _watch(self, pipe: int) -> None:
        """Read the numbers of signals as they arrive, in a thread; :meth:`_handle` can be late."""
        while (number := os.read(pipe, 1)[0]) != 0:
            now = time.monotonic()
            if number not in SIGNALS:
                continue
            if self._seen_at is None:
                self._seen_at = now
                if not connection.wait([pipe], 0.5) and self.received is None:
                    self._announce(number)
            elif _is_new_signal(now - self._seen_at):
                time.sleep(1)  # give the main thread time to handle it
                if not self._exiting:
                    _kill_children()
                    os._exit(128 + number)
        os.close(pipe)

    def _exit(self, number: int) -> None:
        self._exiting = True
        for name in SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        try:
            _kill_children()
        finally:
            os.kill(os.getpid(), number)

    def _check_waiting(self, number: int, frame: FrameType | None) -> None:
        """Raise StoppedWaiting if the next batch is late; called every 0.5 s after a signal."""
        since = self._waiting_since
        if since is not None and time.monotonic() - max(since, self._handled_at) > _batch_wait():
            raise StoppedWaiting


def _is_new_signal(seconds: float) -> bool:
    """Whether a signal this long after the first is a second one, not the first delivered twice."""
    return seconds > (SAME_SIGNAL_DISTRIBUTED if torchrun.is_distributed() else SAME_SIGNAL)


def _batch_wait() -> float:
    return BATCH_WAIT_DISTRIBUTED if torchrun.is_distributed() else BATCH_WAIT


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


@contextlib.contextmanager
def explain_out_of_memory(step: int, batch: Batch, device: str, hint: str) -> Iterator[None]:
    """Turn "out of memory" into a SetupError with the batch's size and the settings to lower.

    ``step`` counts from 1; ``hint`` says how to resume.
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
            f"to {seconds:.1f} s each ({count * seconds:.0f} s in total); lower train_batch_size "
            f"(and raise gradient_accumulate_steps accordingly), or sequence_length; {hint}"
        ) from None


@contextlib.contextmanager
def explain_worker_errors(hint: str) -> Iterator[None]:
    """Turn errors of the data loader's workers into a SetupError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        timeout = re.search(r"DataLoader timed out after (\S+) seconds", message)
        if timeout:
            problem = (
                f"the data loader's workers sent no batch for {float(timeout[1]):g} s: the disk "
                f"does not respond, or shared memory is full ({shared_memory_usage()}); check that "
                f"libri_root can be read, or {shared_memory_advice()}; if the disk is only slow, "
                "raise pretrain_expert.datarc.loader_timeout"
            )
        elif "DataLoader worker" not in message:
            raise
        elif "Bus error" in message:
            problem = (
                f"a data loader worker ran out of shared memory ({shared_memory_usage()}): "
                f"{shared_memory_advice()}"
            )
        else:
            problem = (
                f"a data loader worker was killed ({error}), often because the machine ran out of "
                "memory; lower pretrain_expert.datarc.num_workers"
            )
        raise SetupError(f"{problem}; {hint}") from None


def is_out_of_memory(error: BaseException) -> bool:
    # The texts are from torch's allocators: CUDA, MPS, Linux and other CPUs.
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
