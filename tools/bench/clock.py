"""What each stage of a step costs, in seconds or in floating point operations."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

# In the order of a step; `loss` has what is neither a forward nor an update: masks, aggregation.
STAGES = (
    "read and decode",
    "distort",
    "teacher forward",
    "student forward",
    "loss",
    "backward",
    "optimizer",
)


class Clock:
    """Adds up what a counter goes on by in each stage; a stage inside another is not counted twice.

    Args:
        read: the counter, a few numbers that only grow.

    Attributes:
        spent: stage -> how far each number went on in it.
    """

    def __init__(self, read: Callable[[], Sequence[float]]):
        self.read = read
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(read()))
        self._open: list[str] = []
        self._last: Sequence[float] = ()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, stage: str, function: Callable) -> Callable:
        """A function whose calls are charged to a stage."""

        def charged(*args, **kwargs):
            with self(stage):
                return function(*args, **kwargs)

        return charged

    def _charge(self) -> None:
        now = self.read()
        if self._open:
            spent = self.spent[self._open[-1]]
            for i, (before, after) in enumerate(zip(self._last, now, strict=True)):
                spent[i] += after - before
        self._last = now


def seconds(device: str) -> Callable[[], tuple[float, float]]:
    """Wall and CPU time, both in seconds, read when the device has done all it was given."""

    def read() -> tuple[float, float]:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    return read
