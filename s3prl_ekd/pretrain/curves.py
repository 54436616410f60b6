"""Read and plot the TensorBoard scalars of a run."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto import event_pb2

from ..system.figures import new_figure

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
