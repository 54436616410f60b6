"""Plot a distillation run: the loss, and how near the student is to each teacher's layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import SetupError

_TEACHER = re.compile(r"ekd/train-(?P<teacher>\w+)/(l1|l2|smooth_l1)_layers?(?P<layer>[\d_-]+)$")


def teacher_curves(scalars: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, dict]]:
    """``{teacher: {layer: {step: L1}}}`` from a run's scalars (:mod:`.scalars`).

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
