"""Write, read and plot the TensorBoard scalars of a run that may be killed at any moment.

tensorboardX's SummaryWriter hands its events to a thread, and ``flush`` does not wait for what is
still in its queue: a killed run lacks points from before its last checkpoint, and no resume brings
them back. Here an event is written when it is added.
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


class NoWriter:
    """The logger of a process that does not write."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class ScalarWriter:
    """Write scalars to a new file in a run's folder, with the methods that s3prl calls.

    A point that cannot be written is lost with a warning: a full disk is for the checkpoints to
    report, which matter more.

    Args:
        folder: exists.
        after: the step that the run resumes from: TensorBoard hides later points of other files.
            None for a new run.

    Raises:
        SetupError: no file can be made there.
    """

    def __init__(self, folder: str | Path, after: int | None = None):
        self._warned = False
        try:
            # A file's name has the second only, and a file of the same name would be emptied.
            fraction = f".{time.time_ns() % 1_000_000_000:09d}"
            self._events = EventsWriter(str(Path(folder) / "events"), fraction)
        except OSError as error:
            raise SetupError(f"cannot write into {folder}: {error.strerror}") from None
        if after is not None:
            begin = SessionLog(status=SessionLog.START)
            self._write(Event(step=after + 1, session_log=begin))
        self.flush()

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        """Write one point; ``value`` is anything that ``float`` takes."""
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


_HEADER, _FOOTER = 12, 4  # bytes around a record: its length with a checksum, and a checksum


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """All scalars in ``folder/events.*``: tag -> step -> value.

    A step written twice (a run that was cut and resumed) keeps the later value. A record that was
    cut off at the end of a file is left out.
    """
    scalars: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.*"), key=lambda path: path.stat().st_mtime):
        data, at = path.read_bytes(), 0
        while at + _HEADER <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            record = data[at + _HEADER : at + _HEADER + size]
            at += _HEADER + size + _FOOTER
            if len(record) < size:
                break
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: dict(sorted(points.items())) for tag, points in scalars.items()}


_TEACHER = re.compile(r"ekd/train-(?P<teacher>\w+)/(l1|l2|smooth_l1)_layers?(?P<layer>[\d_-]+)$")


def teacher_curves(scalars: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, dict]]:
    """``{teacher: {layer: {step: L1}}}`` from a run's scalars (:mod:`.tensorboard`).

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
    """Draw the loss beside one panel a teacher and write it as PNG.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("plots need matplotlib; type: pip install 's3prl_ekd[plots]'") from None
    curves = teacher_curves(scalars)
    panels = 1 + len(curves)
    figure = Figure(figsize=(3.4 * panels, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    loss = scalars.get("ekd/train-loss_mean", {})
    axes[0].plot(list(loss), list(loss.values()), color="black")
    axes[0].set(title="loss", xlabel="step", ylabel="L1 + λ · (−log σ cos)")
    top = max((max(points.values()) for c in curves.values() for points in c.values()), default=1)
    for axis, (teacher, layers) in zip(axes[1:], curves.items(), strict=True):
        for layer, points in sorted(layers.items(), key=_first_layer):
            axis.plot(list(points), list(points.values()), label=f"layer {layer}")
        axis.set(title=f"to {teacher}", xlabel="step", ylabel="L1", ylim=(0, 1.05 * top))
        axis.legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
