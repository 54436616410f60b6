"""Write, read and plot the TensorBoard scalars of a run.

tensorboardX's SummaryWriter queues its events for a thread, and ``flush`` does not drain the queue.
A killed run then lacks points from before its last checkpoint, and resuming does not restore them.
Here an event is written when it is added.
"""

from __future__ import annotations

import contextlib
import logging
import re
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ..errors import SetupError

logger = logging.getLogger(__name__)


class NullWriter:
    """The scalar writer of ranks other than 0; writes nothing."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class ScalarWriter:
    """Write scalars to a new event file in a run's folder, with the methods that s3prl calls.

    If a point cannot be written, it is lost and a warning is logged. On a full disk saving a
    checkpoint raises the error.

    Args:
        folder: an existing folder.
        resume_step: step of the checkpoint that the run resumes from, None for a new run.
            TensorBoard then hides later points of older files.

    Raises:
        SetupError: the file cannot be created.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None):
        self._warned = False
        try:
            # The default name has seconds only, and an existing file of that name is overwritten.
            fraction = f".{time.time_ns() % 1_000_000_000:09d}"
            self._events = EventsWriter(str(Path(folder) / "events"), fraction)
        except OSError as error:
            raise SetupError(f"cannot write into {folder}: {error.strerror}") from None
        if resume_step is not None:
            session_start = SessionLog(status=SessionLog.START)
            self._write(Event(step=resume_step + 1, session_log=session_start))
        self.flush()

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Write one point; ``value`` can be anything that ``float()`` accepts."""
        point = Summary.Value(tag=tag, simple_value=float(value))
        self._write(Event(step=global_step, summary=Summary(value=[point])))

    def flush(self) -> None:
        """Flush all points and sync them to disk."""
        if self._events is not None:
            with self._log_errors():
                self._events.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._events is not None:
            with self._log_errors():
                self._events.close()
            self._events = None

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._log_errors():
            self._events.write_event(event)

    @contextlib.contextmanager
    def _log_errors(self) -> Iterator[None]:
        try:
            yield
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
        match = _TEACHER.match(tag)
        if match:
            curves.setdefault(match["teacher"], {})[match["layer"]] = dict(points)
    return curves


def _first_layer(item: tuple[str, dict]) -> int:
    return int(re.split("[_-]", item[0])[0])


def plot_run(scalars: Mapping[str, Mapping[int, float]], path: str | Path) -> None:
    """Plot the loss and, in a panel for each teacher, the distance to its layers; write a PNG file.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("plots require matplotlib; type: pip install 's3prl_ekd[plots]'") from None
    curves = teacher_curves(scalars)
    panels = 1 + len(curves)
    figure = Figure(figsize=(3.4 * panels, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    loss = scalars.get("ekd/train-loss_mean", {})
    axes[0].plot(list(loss), list(loss.values()), color="black")
    axes[0].set(title="loss", xlabel="step", ylabel="distance + λ · cosine term")
    top = max((max(points.values()) for c in curves.values() for points in c.values()), default=1)
    for axis, (teacher, layers) in zip(axes[1:], curves.items(), strict=True):
        for layer, points in sorted(layers.items(), key=_first_layer):
            axis.plot(list(points), list(points.values()), label=f"layer {layer}")
        axis.set(title=f"to {teacher}", xlabel="step", ylabel="distance", ylim=(0, 1.05 * top))
        axis.legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
