"""The plots of a report: bars with intervals, parameters against scores, scores under noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..analysis.plots import require_matplotlib
from ..downstream.tasks import TASKS
from .report import CLEAN, Measure, Report, Score, condition_title, split_condition
from .score import PUBLISHED, superb_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, with grey for their yellow, too
# light for thin lines; beyond seven upstreams the hatch, or the line's dashes, change.
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #777777".split()
HATCHES = ("", "////", "....", "xxxx")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, drawn without a display."""
    canvas, figure_class = require_matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def add_legend(figure: Figure, handles: Mapping[str, object], size: int = 9) -> None:
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


def plots(report: Report, *, published: bool = False) -> dict[str, Callable[[BinaryIO], None]]:
    """File name -> what draws it, for the plots that this report has data for."""
    found: dict[str, Callable[[BinaryIO], None]] = {"scores.png": lambda p: plot_scores(report, p)}
    costs = [report.costs[name] for name in report.upstreams if name in report.costs]
    if any(cost.parameters for cost in costs):
        found["params.png"] = lambda p: plot_parameters(report, p, published=published)
    if noises(report):
        found["noise.png"] = lambda p: plot_noise(report, p)
    return found


def noises(report: Report) -> dict[str, list[str]]:
    """Noise -> its conditions by falling SNR, for noises at several SNRs."""
    found: dict[str, list[str]] = {}
    for condition in report.conditions:
        parts = split_condition(condition)
        if parts:
            found.setdefault(parts[0], []).append(condition)
    return {noise: conditions for noise, conditions in found.items() if len(conditions) > 1}


def plot_scores(report: Report, path: Path | BinaryIO) -> None:
    """A panel a task, a group of bars a condition, a bar an upstream; bars bear the interval."""
    count, groups = len(report.upstreams), len(report.conditions)
    wide = 0.26 * groups * (count + 1.2)  # inches of bars in a panel
    columns = 1 if wide > 5 else min(2, len(report.tasks))
    rows = -(-len(report.tasks) // columns)
    figure = new_figure(columns * (1.1 + max(2.4, min(wide, 16))) + 2.2, 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for axis, task in zip(axes, report.tasks, strict=False):
        for i, name in enumerate(report.upstreams):
            for g, condition in enumerate(report.conditions):
                m = report.measures.get((name, task, condition))
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
        margin = max(1.0, (4 - end) / 2)  # one bar alone must not fill the panel
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
    """Parameters, on a log axis, against the score, or where one lacks it against each metric."""
    known = [name for name in report.upstreams if name in report.costs]
    panels: list[tuple[str, str, Mapping[str, Measure | Score]]] = []
    if all(name in report.scores for name in known):
        panels.append(("SUPERB score: higher is better ↑", "score (public anchors)", report.scores))
    else:
        for task in report.tasks:
            keys = {name: (name, task, CLEAN) for name in known}
            found = {n: report.measures[key] for n, key in keys.items() if key in report.measures}
            panels.append((direction(task), unit(task), found))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.4 * columns + 2.4, 3.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, object] = {}
    for axis, (title, label, values) in zip(axes, panels, strict=False):
        _parameter_panel(axis, report, known, values, handles)
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
    known: Sequence[str],
    values: Mapping[str, Measure | Score],
    handles: dict[str, object],
) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", subs=[])
    sizes = [report.costs[name].parameters / 1e6 for name in known]
    for place, name in enumerate(known):
        if name not in values:
            continue
        i, m = report.upstreams.index(name), values[name]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        size = sizes[place]
        if size == 0:  # no place on a log axis
            line = axis.axhline(m.value, color=colour, linestyle="--")
            low, high = m.interval
            axis.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
            handles.setdefault(f"{name} (none)", line)
            continue
        # Students of one size would lie on each other: side by side they can be told apart.
        aside = sizes[:place].count(size) - (sizes.count(size) - 1) / 2
        point = axis.errorbar(
            size * 1.06**aside,
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
    """A row a task, a column a noise: the metric against SNR, a line an upstream, clean beside."""
    found = noises(report)
    noisy = {task for conditions in found.values() for c in conditions for task in report.tested(c)}
    tasks = [task for task in report.tasks if task in noisy]
    figure = new_figure(3.6 * len(found) + 2.6, 2.7 * len(tasks))
    axes = figure.subplots(len(tasks), len(found), squeeze=False, sharey="row")
    handles: dict[str, object] = {}
    for task, row in zip(tasks, axes, strict=True):
        for axis, (noise, falling) in zip(row, found.items(), strict=True):
            shown = [*reversed(falling), CLEAN]  # from the worst to the best
            for i, name in enumerate(report.upstreams):
                places = [
                    (x, report.measures[name, task, condition])
                    for x, condition in enumerate(shown)
                    if (name, task, condition) in report.measures
                ]
                if not places:
                    continue
                shift = 0.3 * (i - (len(report.upstreams) - 1) / 2) / len(report.upstreams)
                bars = [error_bar(m.value, *m.interval) for _, m in places]
                errors = [[bar[side][0] for bar in bars] for side in (0, 1)]
                line = axis.errorbar(
                    [x + shift for x, _ in places],
                    [m.value for _, m in places],
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
