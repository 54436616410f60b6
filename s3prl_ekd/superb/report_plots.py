"""Plot a report: metrics as bars, scores against parameters, metrics against SNR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO

from ..downstream.tasks import COLUMNS
from ..system.figures import new_figure
from .bootstrap import Estimate
from .report import Report, condition_title, split_condition
from .results import CLEAN
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


def add_legend(figure: Figure, handles: Mapping[str, object], size: int = 9) -> None:
    """Add one legend (label -> artist) to the right of all panels; ``size`` in points."""
    place = "outside right upper"
    figure.legend(handles.values(), handles, loc=place, frameon=False, fontsize=size)


def error_bar(value: float, low: float, high: float) -> list[list[float]]:
    """matplotlib's ``yerr``; 0 on a side where ``value`` is outside (with few utterances)."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def plots(report: Report, *, published: bool = False) -> dict[str, Callable[[BinaryIO], None]]:
    """File name -> function that draws the plot, for plots that the report has data for."""
    drawers: dict[str, Callable[[BinaryIO], None]] = {
        "scores.png": lambda file: plot_scores(report, file)
    }
    if any(report.costs[name].parameters for name in report.upstreams if name in report.costs):
        drawers["params.png"] = lambda file: plot_parameters(report, file, published)
    if _noises(report):
        drawers["noise.png"] = lambda file: plot_noise(report, file)
    return drawers


def plot_scores(report: Report, file: BinaryIO) -> None:
    """Plot a panel for each metric: bars of the upstreams with intervals, grouped by condition."""
    step = len(report.upstreams) + 1.2  # from a condition's first bar to the next one's
    bars_width = 0.26 * step * len(report.conditions)  # of a panel, in inches
    columns = 1 if bars_width > 5 else min(2, len(report.columns))
    width = columns * (1.1 + max(2.4, min(bars_width, 16))) + 2.2
    figure, axes = _grid(len(report.columns), columns, width, 2.7)
    handles: dict[str, object] = {}
    for axis, column in zip(axes, report.columns, strict=True):
        for i, name in enumerate(report.upstreams):
            for g, condition in enumerate(report.conditions):
                m = report.metrics.get((name, column, condition))
                if m is None:
                    continue
                hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
                style = {"color": COLOURS[i % len(COLOURS)], "hatch": hatch, "edgecolor": "black"}
                x, bars = g * step + i, error_bar(m.value, *m.interval)
                handle = axis.bar(x, m.value, width=0.9, linewidth=0.5, **style)
                axis.errorbar(x, m.value, bars, color="black", capsize=2, linewidth=0.9)
                handles.setdefault(name, handle)
        centres = [g * step + (step - 2.2) / 2 for g in range(len(report.conditions))]
        titles = [condition_title(c).replace(", ", "\n") for c in report.conditions]
        axis.set_xticks(centres, titles)
        end = len(report.conditions) * step - 2.2
        margin = max(1.0, (4 - end) / 2)  # so that a single bar does not fill the panel
        axis.set_xlim(-margin, end + margin)
        axis.tick_params(axis="x", length=0, labelsize=8)
        axis.set_title(_direction(column), fontsize=10)
        axis.set_ylabel(_unit(column))
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    add_legend(figure, {name: handles[name] for name in report.upstreams if name in handles})
    figure.savefig(file, dpi=130, format="png")


def plot_parameters(report: Report, file: BinaryIO, published: bool) -> None:
    """Plot the score, or each metric if a score is missing, against parameters (log)."""
    names = [name for name in report.upstreams if name in report.costs]
    panels: list[tuple[str, str, Mapping[str, Estimate]]] = []
    scores = all(name in report.scores for name in names)
    if scores:
        panels.append(("SUPERB score: higher is better ↑", "score (public anchors)", report.scores))
    else:
        for column in report.columns:
            by_name = {n: m for (n, *cell), m in report.metrics.items() if cell == [column, CLEAN]}
            panels.append((_direction(column), _unit(column), by_name))
    columns = min(2, len(panels))
    figure, axes = _grid(len(panels), columns, 4.4 * columns + 2.4, 3.4)
    handles: dict[str, object] = {}
    for axis, (title, label, values) in zip(axes, panels, strict=True):
        _parameter_panel(axis, report, names, values, handles)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
    if scores and published:
        _published_points(axes[0], handles)
    add_legend(figure, handles)
    figure.savefig(file, dpi=130, format="png")


def _parameter_panel(
    axis: Axes,
    report: Report,
    names: Sequence[str],
    values: Mapping[str, Estimate],
    handles: dict[str, object],
) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_xscale("log", subs=[])
    sizes = [report.costs[name].parameters / 1e6 for name in names]
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if name not in values:
            continue
        i, m = report.upstreams.index(name), values[name]
        colour = COLOURS[i % len(COLOURS)]
        if size == 0:  # cannot be shown on a log axis: a horizontal line
            line = axis.axhline(m.value, color=colour, linestyle="--")
            axis.axhspan(*m.interval, color=colour, alpha=0.15, linewidth=0)
            handles.setdefault(f"{name} (none)", line)
            continue
        # Upstreams of the same size would overlap: shift them sideways.
        offset = sizes[:index].count(size) - (sizes.count(size) - 1) / 2
        point = axis.errorbar(
            size * 1.06**offset,
            m.value,
            yerr=error_bar(m.value, *m.interval),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            markeredgecolor="black",
            markersize=7,
            capsize=3,
            linestyle="none",
        )
        handles.setdefault(f"{name} ({size:.3g} M)", point)
    if any(sizes):
        axis.set_xlim(min(filter(None, sizes)) / 2, max(sizes) * 2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("parameters (millions, log)")
    axis.grid(alpha=0.3)


def _published_points(axis: Axes, handles: dict[str, object]) -> None:
    style = {"color": "white", "markeredgecolor": "dimgray", "linestyle": "none"}
    for i, row in enumerate(row for row in PUBLISHED if row.parameters):
        score, marker = superb_score(row.metrics), MARKERS[i % len(MARKERS)]
        (handles[f"{row.name}, published"],) = axis.plot(
            row.parameters, score, marker=marker, **style
        )
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 15), max(high, 150))


def plot_noise(report: Report, file: BinaryIO) -> None:
    """Plot metrics against SNR, then clean: a row for each metric, a column for each noise."""
    by_noise = _noises(report)
    noisy = {t for conditions in by_noise.values() for c in conditions for t in report.tested(c)}
    rows = [column for column in report.columns if column in noisy]
    figure = new_figure(3.6 * len(by_noise) + 2.6, 2.7 * len(rows))
    axes = figure.subplots(len(rows), len(by_noise), squeeze=False, sharey="row")
    handles: dict[str, object] = {}
    for column, row in zip(rows, axes, strict=True):
        for axis, (noise, descending) in zip(row, by_noise.items(), strict=True):
            conditions = [*reversed(descending), CLEAN]  # ascending SNR
            for i, name in enumerate(report.upstreams):
                keys = [(name, column, condition) for condition in conditions]
                points = {x: report.metrics[k] for x, k in enumerate(keys) if k in report.metrics}
                if not points:
                    continue
                shift = 0.3 * (i - (len(report.upstreams) - 1) / 2) / len(report.upstreams)
                bars = [error_bar(m.value, *m.interval) for m in points.values()]
                line = axis.errorbar(
                    [x + shift for x in points],
                    [m.value for m in points.values()],
                    yerr=[[bar[side][0] for bar in bars] for side in (0, 1)],
                    color=COLOURS[i % len(COLOURS)],
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle=LINES[i // len(COLOURS) % len(LINES)],
                    markeredgecolor="black",
                    markersize=5,
                    capsize=2,
                    linewidth=1.2,
                )
                handles.setdefault(name, line)
            parts = [split_condition(condition) for condition in conditions]
            labels = ["clean" if part is None else f"{part[1]:g}" for part in parts]
            axis.set_xticks(range(len(conditions)), labels)
            axis.set_xlim(-0.4, len(conditions) - 0.6)
            axis.set_title(f"{noise}, {_direction(column)}", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(_unit(column))
    for axis in axes[-1]:
        axis.set_xlabel("SNR (dB)")
    add_legend(figure, {name: handles[name] for name in report.upstreams if name in handles})
    figure.savefig(file, dpi=130, format="png")


def _noises(report: Report) -> dict[str, list[str]]:
    """Noise -> its conditions by descending SNR, for noises tested at several SNRs."""
    by_noise: dict[str, list[str]] = {}
    for condition in report.conditions:
        if parts := split_condition(condition):
            by_noise.setdefault(parts[0], []).append(condition)
    return {noise: conditions for noise, conditions in by_noise.items() if len(conditions) > 1}


def _grid(panels: int, columns: int, width: float, row_height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``panels`` panels in rows of ``columns``; sizes in inches."""
    rows = -(-panels // columns)
    figure = new_figure(width, row_height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _direction(column: str) -> str:
    """A task's name, and whether higher or lower is better."""
    task, metric = COLUMNS[column].task, COLUMNS[column].metric
    better = "higher" if metric.higher_is_better else "lower"
    return f"{task.name.upper()}: {better} is better {metric.arrow}"


def _unit(column: str) -> str:
    """The axis label of a metric."""
    metric = COLUMNS[column].metric.name
    return "accuracy (%)" if metric == "acc" else f"{metric.upper()} (%)"
