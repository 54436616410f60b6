"""Plot a report: metrics as bars, scores against parameters, metrics against SNR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..analysis.plots import require_matplotlib
from ..downstream.tasks import TASKS
from .report import CLEAN, Report, SuperbScore, TaskMetric, condition_title, split_condition
from .score import PUBLISHED, superb_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers, with grey instead of its yellow, which is too
# light for thin lines. Beyond seven upstreams the colours repeat with another hatch or dash.
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #777777".split()
HATCHES = ("", "////", "....", "xxxx")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float) -> Figure:
    """Create a figure of a size in inches, without a display."""
    canvas, figure_class = require_matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def add_legend(figure: Figure, handles: Mapping[str, object], size: int = 9) -> None:
    """Add one legend (label -> artist) to the right of all panels; ``size`` in points."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside right upper",
        frameon=False,
        fontsize=size,
    )


def error_bar(value: float, low: float, high: float) -> list[list[float]]:
    """matplotlib's ``yerr``; 0 on a side where ``value`` is outside (with few utterances)."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def direction(task: str) -> str:
    """A task's name, and whether higher or lower is better."""
    better = "higher is better ↑" if TASKS[task].higher_is_better else "lower is better ↓"
    return f"{task.upper()}: {better}"


def unit(task: str) -> str:
    """The axis label of a task's metric."""
    metric = TASKS[task].metric
    return "accuracy (%)" if metric == "acc" else f"{metric.upper()} (%)"


def plots(report: Report, *, published: bool = False) -> dict[str, Callable[[BinaryIO], None]]:
    """File name -> function that draws the plot, for plots that the report has data for."""
    drawers: dict[str, Callable[[BinaryIO], None]] = {
        "scores.png": lambda p: plot_scores(report, p)
    }
    costs = [report.costs[name] for name in report.upstreams if name in report.costs]
    if any(cost.parameters for cost in costs):
        drawers["params.png"] = lambda p: plot_parameters(report, p, published=published)
    if noises(report):
        drawers["noise.png"] = lambda p: plot_noise(report, p)
    return drawers


def noises(report: Report) -> dict[str, list[str]]:
    """Noise -> its conditions by descending SNR, for noises tested at several SNRs."""
    by_noise: dict[str, list[str]] = {}
    for condition in report.conditions:
        parts = split_condition(condition)
        if parts:
            by_noise.setdefault(parts[0], []).append(condition)
    return {noise: conditions for noise, conditions in by_noise.items() if len(conditions) > 1}


def plot_scores(report: Report, path: Path | BinaryIO) -> None:
    """Plot a panel for each task: bars of the upstreams with intervals, grouped by condition."""
    count, groups = len(report.upstreams), len(report.conditions)
    bars_width = 0.26 * groups * (count + 1.2)  # of a panel, in inches
    columns = 1 if bars_width > 5 else min(2, len(report.tasks))
    rows = -(-len(report.tasks) // columns)
    figure = new_figure(columns * (1.1 + max(2.4, min(bars_width, 16))) + 2.2, 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for axis, task in zip(axes, report.tasks, strict=False):
        for i, name in enumerate(report.upstreams):
            for g, condition in enumerate(report.conditions):
                m = report.metrics.get((name, task, condition))
                if m is None:
                    continue
                x = g * (count + 1.2) + i
                bar = axis.bar(
                    x,
                    m.value,
                    width=0.9,
                    color=COLOURS[i % len(COLOURS)],
                    hatch=HATCHES[i // len(COLOURS) % len(HATCHES)],
                    edgecolor="black",
                    linewidth=0.5,
                )
                axis.errorbar(
                    x,
                    m.value,
                    yerr=error_bar(m.value, *m.interval),
                    color="black",
                    capsize=2,
                    linewidth=0.9,
                )
                handles.setdefault(name, bar)
        centres = [g * (count + 1.2) + (count - 1) / 2 for g in range(groups)]
        axis.set_xticks(
            centres, [condition_title(c).replace(", ", "\n") for c in report.conditions]
        )
        end = (groups - 1) * (count + 1.2) + count - 1
        margin = max(1.0, (4 - end) / 2)  # so that a single bar does not fill the panel
        axis.set_xlim(-margin, end + margin)
        axis.tick_params(axis="x", length=0, labelsize=8)
        axis.set_title(direction(task), fontsize=10)
        axis.set_ylabel(unit(task))
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    for axis in axes[len(report.tasks) :]:
        axis.set_visible(False)
    add_legend(figure, {name: handles[name] for name in report.upstreams if name in handles})
    figure.savefig(path, dpi=130, format="png")


def plot_parameters(report: Report, path: Path | BinaryIO, *, published: bool = False) -> None:
    """Plot the score, or each task's metric if a score is missing, against parameters (log)."""
    names = [name for name in report.upstreams if name in report.costs]
    panels: list[tuple[str, str, Mapping[str, TaskMetric | SuperbScore]]] = []
    if all(name in report.scores for name in names):
        panels.append(("SUPERB score: higher is better ↑", "score (public anchors)", report.scores))
    else:
        for task in report.tasks:
            keys = {name: (name, task, CLEAN) for name in names}
            by_name = {n: report.metrics[key] for n, key in keys.items() if key in report.metrics}
            panels.append((direction(task), unit(task), by_name))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns + 2.4, 3.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for axis, (title, label, values) in zip(axes, panels, strict=False):
        _parameter_panel(axis, report, names, values, handles)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
        if values is report.scores and published:
            _published_points(axis, handles)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    add_legend(figure, handles)
    figure.savefig(path, dpi=130, format="png")


def _parameter_panel(
    axis: Axes,
    report: Report,
    names: Sequence[str],
    values: Mapping[str, TaskMetric | SuperbScore],
    handles: dict[str, object],
) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", subs=[])
    sizes = [report.costs[name].parameters / 1e6 for name in names]
    for index, name in enumerate(names):
        if name not in values:
            continue
        i, m = report.upstreams.index(name), values[name]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        size = sizes[index]
        if size == 0:  # cannot be shown on a log axis: a horizontal line
            line = axis.axhline(m.value, color=colour, linestyle="--")
            low, high = m.interval
            axis.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
            handles.setdefault(f"{name} (none)", line)
            continue
        # Upstreams of the same size would overlap: shift them sideways.
        offset = sizes[:index].count(size) - (sizes.count(size) - 1) / 2
        point = axis.errorbar(
            size * 1.06**offset,
            m.value,
            yerr=error_bar(m.value, *m.interval),
            color=colour,
            marker=marker,
            markeredgecolor="black",
            markersize=7,
            capsize=3,
            linestyle="none",
        )
        handles.setdefault(f"{name} ({_millions(size)})", point)
    if any(sizes):
        axis.set_xlim(min(filter(None, sizes)) / 2, max(sizes) * 2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("parameters (millions, log)")
    axis.grid(alpha=0.3)


def _millions(size: float) -> str:
    return f"{size:.3g} M"


def _published_points(axis: Axes, handles: dict[str, object]) -> None:
    rows = [row for row in PUBLISHED if row.parameters]
    for i, row in enumerate(rows):
        (point,) = axis.plot(
            row.parameters,
            superb_score(row.metrics),
            marker=MARKERS[i % len(MARKERS)],
            color="white",
            markeredgecolor="dimgray",
            linestyle="none",
        )
        handles[f"{row.name}, published"] = point
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 15), max(high, 150))


def plot_noise(report: Report, path: Path | BinaryIO) -> None:
    """Plot metrics against SNR, then clean: a row for each task, a column for each noise."""
    by_noise = noises(report)
    noisy = {t for conditions in by_noise.values() for c in conditions for t in report.tested(c)}
    tasks = [task for task in report.tasks if task in noisy]
    figure = new_figure(3.6 * len(by_noise) + 2.6, 2.7 * len(tasks))
    axes = figure.subplots(len(tasks), len(by_noise), squeeze=False, sharey="row")
    handles: dict[str, object] = {}
    for task, row in zip(tasks, axes, strict=True):
        for axis, (noise, descending) in zip(row, by_noise.items(), strict=True):
            shown = [*reversed(descending), CLEAN]  # ascending SNR
            for i, name in enumerate(report.upstreams):
                points = [
                    (x, report.metrics[name, task, condition])
                    for x, condition in enumerate(shown)
                    if (name, task, condition) in report.metrics
                ]
                if not points:
                    continue
                shift = 0.3 * (i - (len(report.upstreams) - 1) / 2) / len(report.upstreams)
                bars = [error_bar(m.value, *m.interval) for _, m in points]
                errors = [[bar[side][0] for bar in bars] for side in (0, 1)]
                line = axis.errorbar(
                    [x + shift for x, _ in points],
                    [m.value for _, m in points],
                    yerr=errors,
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle=LINES[i // len(COLOURS) % len(LINES)],
                    markeredgecolor="black",
                    markersize=5,
                    capsize=2,
                    linewidth=1.2,
                )
                handles.setdefault(name, line)
            parts = [split_condition(condition) for condition in shown]
            labels = ["clean" if part is None else f"{part[1]:g}" for part in parts]
            axis.set_xticks(range(len(shown)), labels)
            axis.set_xlim(-0.4, len(shown) - 0.6)
            axis.set_title(f"{noise}, {direction(task)}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(unit(task))
    for axis in axes[-1]:
        axis.set_xlabel("SNR (dB)")
    add_legend(figure, {name: handles[name] for name in report.upstreams if name in handles})
    figure.savefig(path, dpi=130, format="png")
