"""Plots of the means and of the differences, with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from s3prl_ekd.analysis.plots import new_figure
from s3prl_ekd.superb.report_plots import COLOURS, LINES, MARKERS, add_legend, error_bar

from .compare import RowComparison, Study
from .design import CLEAN, ENSEMBLES, NONE, StudyRow

ABOUT = {
    "study.png": "means over the seeds with 95 % intervals",
    "study.differences.png": "differences with 95 % intervals",
}


def plots(study: Study) -> dict[str, Callable[[BinaryIO], None]]:
    """File name -> function that draws the plot, for plots that have data."""
    functions: dict[str, Callable[[BinaryIO], None]] = {}
    if study.means:
        functions["study.png"] = lambda file: plot_means(study, file)
    if study.comparisons:
        functions["study.differences.png"] = lambda file: plot_differences(study, file)
    return functions


def plot_means(study: Study, file: BinaryIO) -> None:
    """Plot the means: a row of panels for each condition, a column for each metric.

    The x axis is the source (single teacher, aggregation or none); the colour is the size.
    """
    sources = [NONE, *study.setting.teachers, *ENSEMBLES]
    conditions, metrics = study.results.conditions, study.metrics
    figure = new_figure(2.6 * len(metrics) + 1.4, 2.9 * len(conditions))
    axes = figure.subplots(len(conditions), len(metrics), squeeze=False)
    handles: dict[str, object] = {}
    for line, condition in enumerate(conditions):
        for axis, metric in zip(axes[line], metrics, strict=True):
            for i, size in enumerate(study.setting.sizes):
                shift = 0.16 * (i - (len(study.setting.sizes) - 1) / 2)
                for x, source in enumerate(sources):
                    e = study.means.get((StudyRow(size, source).name, metric.key, condition))
                    if e is None:
                        continue
                    bars = error_bar(e.value, e.low, e.high)
                    handles[f"size {size}"] = axis.errorbar(
                        x + shift, e.value, bars, **_style(i), markersize=5, capsize=2, linewidth=1,
                    )  # fmt: skip
            for i, name in enumerate(study.results.references):
                e = study.means.get((name, metric.key, condition))
                if e is not None:
                    handles[name] = axis.axhline(
                        e.value, color=COLOURS[(2 + i) % len(COLOURS)], linewidth=1,
                        linestyle=LINES[i % len(LINES)],
                    )  # fmt: skip
            axis.set_title(f"{metric.title}, {_short(condition)}", fontsize=9)
            axis.set_xticks(range(len(sources)), sources, rotation=60, ha="right", fontsize=7)
            axis.tick_params(axis="y", labelsize=7)
            axis.set_ylabel("%", fontsize=7)
            axis.grid(axis="y", alpha=0.3)
    if handles:
        add_legend(figure, handles, size=8)
    figure.savefig(file, dpi=110, format="png")


def plot_differences(study: Study, file: BinaryIO) -> None:
    """Plot the differences: a panel for each metric, a line for each difference.

    Markers are filled if the interval excludes 0.
    """
    metrics, conditions = study.metrics, study.results.conditions
    pairs = list(dict.fromkeys(map(_pair, study.comparisons)))
    figure = new_figure(2.3 * len(metrics) + 2.2, 0.36 * len(pairs) + 1.5)
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    handles: dict[str, object] = {}
    for axis, metric in zip(axes, metrics, strict=True):
        for c in study.comparisons:
            if c.metric != metric:
                continue
            i = conditions.index(c.condition)
            y = pairs.index(_pair(c)) + 0.24 * (i - (len(conditions) - 1) / 2)
            e = c.estimate
            bars = error_bar(e.value, e.low, e.high)
            handles[_short(c.condition)] = axis.errorbar(
                e.value, y, xerr=bars, **_style(i), capsize=2, linewidth=1, markersize=4,
                markerfacecolor=_style(i)["color"] if e.excludes_zero else "white",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        better = "right" if metric.higher else "left"
        axis.set_title(f"{metric.title[:-2]}\n{better} of 0 is better", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(pairs)), pairs, fontsize=7)
    axes[0].invert_yaxis()
    add_legend(figure, handles, size=8)
    figure.savefig(file, dpi=110, format="png")


def _pair(c: RowComparison) -> str:
    return f"{c.size}: {c.label}"


def _style(number: int) -> dict[str, str]:
    """Marker and colour of a size or condition."""
    return {"fmt": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}


def _short(condition: str) -> str:
    return CLEAN if condition == CLEAN else condition.replace("_snr", ", ") + " dB"
