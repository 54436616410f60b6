"""What the plots of a report have in common: colours, labels, a figure without a display."""

from __future__ import annotations

from collections.abc import Mapping

from ..analysis.plots import require_matplotlib
from ..downstream.tasks import TASKS

# Okabe and Ito's colours, which colour-blind readers tell apart, with grey for their yellow, too
# light for thin lines; beyond seven upstreams the hatch, or the line's dashes, change.
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #777777".split()
HATCHES = ("", "////", "....", "xxxx")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float):
    """A figure of that size in inches, drawn without a display."""
    canvas, figure_class = require_matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def add_legend(figure, handles: Mapping[str, object], size: int = 9) -> None:
    """One legend beside all panels: what it says -> what it shows; ``size`` in points."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside right upper",
        frameon=False,
        fontsize=size,
    )


def error_bar(value: float, low: float, high: float) -> list[list[float]]:
    """matplotlib's ``xerr`` or ``yerr``; 0 where the value lies outside (a skewed draw of few
    utterances)."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def direction(task: str) -> str:
    """A task's name and which way is the better one."""
    better = "higher is better ↑" if TASKS[task].higher_is_better else "lower is better ↓"
    return f"{task.upper()}: {better}"


def unit(task: str) -> str:
    """The label of an axis with the task's metric."""
    metric = TASKS[task].metric
    return "accuracy (%)" if metric == "acc" else f"{metric.upper()} (%)"
