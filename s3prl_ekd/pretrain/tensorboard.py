"""TensorBoard files of a run that may be killed at any moment.

tensorboardX's SummaryWriter hands its events to a thread, and ``flush`` does not wait for what is
still on the way: a killed run lacks points from before its last checkpoint, and no resume brings
them back. Here an event is written when it is added.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ..errors import SetupError

logger = logging.getLogger(__name__)


class NoWriter:
    """What a process has that does not write."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class ScalarWriter:
    """Write scalars to a new file in a run's folder; what s3prl and our adapter ask of a logger.

    A point that cannot be written is lost with a warning: a full disk is for the checkpoints to
    report, which matter more.

    Args:
        folder: exists.
        after: a run goes on after this step: TensorBoard hides what other files have of later
            ones. None for a new run.

    Raises:
        SetupError: no file can be made there.
    """

    def __init__(self, folder: str | Path, after: int | None = None):
        self._warned = False
        try:
            # The name tells the second, and a file of that name would be emptied: here is the rest.
            fraction = f".{time.time_ns() % 1_000_000_000:09d}"
            self._events = EventsWriter(str(Path(folder) / "events"), fraction)
        except OSError as error:
            raise SetupError(f"cannot write into {folder}: {error.strerror}") from None
        if after is not None:
            begin = SessionLog(status=SessionLog.START)
            self._write(Event(step=after + 1, session_log=begin))
        self.flush()

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """One point; ``value`` is anything that ``float`` takes."""
        point = Summary.Value(tag=tag, simple_value=float(value))
        self._write(Event(step=global_step, summary=Summary(value=[point])))

    def flush(self) -> None:
        """Hand all points to the operating system, and ask it to put them on the disk."""
        if self._events is not None:
            with self._no_error():
                self._events.flush()

    def close(self) -> None:
        """Flush and close; a second time does nothing."""
        if self._events is not None:
            with self._no_error():
                self._events.close()
            self._events = None

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._no_error():
            self._events.write_event(event)

    @contextlib.contextmanager
    def _no_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("TensorBoard's file cannot be written: %s", error.strerror)
            self._warned = True
