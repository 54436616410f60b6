"""Write the TensorBoard scalars of a run; :mod:`.curves` reads and plots them.

tensorboardX's SummaryWriter queues its events for a thread, and ``flush`` does not drain the queue.
A killed run then lacks points from before its last checkpoint, and resuming does not restore them.
Here an event is written when it is added.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ..files.atomic import explain_write_errors

logger = logging.getLogger(__name__)


class ScalarWriter:
    """Write scalars to a new event file in a run's folder, with the methods that s3prl calls.

    If a point cannot be written, it is lost and a warning is logged. On a full disk saving a
    checkpoint raises the error.

    Args:
        folder: an existing folder; None writes nothing, for ranks other than 0.
        resume_step: step of the checkpoint that the run resumes from, None for a new run.
            TensorBoard then hides later points of older files.

    Raises:
        SetupError: the file cannot be created.
    """

    def __init__(self, folder: str | Path | None, resume_step: int | None = None):
        self._warned = False
        self._events: EventsWriter | None = None
        if folder is None:
            return
        with explain_write_errors(folder):
            # The default name has seconds only, and an existing file of that name is overwritten.
            fraction = f".{time.time_ns() % 1_000_000_000:09d}"
            self._events = EventsWriter(str(Path(folder) / "events"), fraction)
        if resume_step is not None:
            session_start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=session_start))
        self.flush()

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Write one point; ``value`` can be anything that ``float()`` accepts."""
        point = Summary.Value(tag=tag, simple_value=float(value))
        self._write(Event(step=global_step, summary=Summary(value=[point])))

    def add_picture(self, tag: str, picture: bytes, global_step: int) -> None:
        """Write the contents of a PNG file with transparency."""
        width, height = struct.unpack_from(">II", picture, 16)
        image = Summary.Image(
            encoded_image_string=picture, width=width, height=height, colorspace=4
        )
        value = Summary.Value(tag=tag, image=image)
        self._write(Event(step=global_step, summary=Summary(value=[value])))

    def flush(self) -> None:
        """Flush all points and sync them to disk."""
        self._call(EventsWriter.flush)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        self._call(EventsWriter.close)
        self._events = None

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._call(EventsWriter.write_event, event)

    def _call(self, method: Callable[..., Any], *args: Any) -> None:
        try:
            if self._events is not None:
                method(self._events, *args)
        except OSError as error:
            if not self._warned:
                logger.warning("cannot write the TensorBoard file: %s", error.strerror)
            self._warned = True
