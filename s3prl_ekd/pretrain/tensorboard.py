"""Write, read and plot the TensorBoard scalars of a run.

tensorboardX's SummaryWriter queues its events for a thread, and ``flush`` does not drain the queue.
A killed run then lacks points from before its last checkpoint, and resuming does not restore them.
Here an event is written when it is added.
"""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ..files.atomic import explain_write_errors
from ..system.figures import new_figure

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


_HEADER, _FOOTER = 12, 4  # bytes around a record: its length with a checksum, and a checksum


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """All scalars in ``folder/events.*``: tag -> step -> value.

    If a step was written twice, by a run that was interrupted and resumed, the later value counts.
    A truncated record at the end of a file is ignored.
    """
    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.*"), key=lambda path: path.stat().st_mtime):
        data, offset = path.read_bytes(), 0
        while offset + _HEADER <= len(data):
            (size,) = struct.unpack_from("<Q", data, offset)
            record = data[offset + _HEADER : offset + _HEADER + size]
            offset += _HEADER + size + _FOOTER
            if len(record) < size:
                break
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: dict(sorted(points.items())) for tag, points in scalars.items()}


_TEACHER = re.compile(r"ekd/train-(?P<teacher>\w+)/(l1|l2|smooth_l1)_layers?(?P<layer>[\d_-]+)$")


def teacher_curves(scalars: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, dict]]:
    """Extract ``{teacher: {layer: {step: distance}}}`` from the scalars of :func:`read_scalars`.

    A layer is a number as text, or ``1-3`` for a group of layers.
    """
    curves: dict[str, dict[str, dict]] = {}
    for tag, points in scalars.items():
        if match := _TEACHER.match(tag):
            curves.setdefault(match["teacher"], {})[match["layer"]] = dict(points)
    return curves


def plot_run(scalars: Mapping[str, Mapping[int, float]], path: str | Path) -> None:
    """Plot the loss and, in a panel for each teacher, the distance to its layers; write a PNG file.

    Raises:
        SetupError: matplotlib is not installed.
    """
    curves = teacher_curves(scalars)
    panels = 1 + len(curves)
    figure = new_figure(3.4 * panels, 3)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    loss = scalars.get("ekd/train-loss_mean", {})
    axes[0].plot(list(loss), list(loss.values()), color="black")
    axes[0].set(title="loss", xlabel="step", ylabel="distance + λ · cosine term")
    top = max((max(points.values()) for c in curves.values() for points in c.values()), default=1)
    for axis, (teacher, layers) in zip(axes[1:], curves.items(), strict=True):
        for layer in sorted(layers, key=lambda layer: int(re.split("[_-]", layer)[0])):
            axis.plot(list(layers[layer]), list(layers[layer].values()), label=f"layer {layer}")
        axis.set(title=f"to {teacher}", xlabel="step", ylabel="distance", ylim=(0, 1.05 * top))
        axis.legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
