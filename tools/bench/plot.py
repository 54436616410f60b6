"""The stages of a step as stacked bars, one for each side of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping

from ..superb.report_plots import COLOURS, add_legend, new_figure
from .bench_clock import STAGES
from .bench_report import STEP, rows, stages


def plot_bench(result: Mapping) -> bytes:
    """Draw the median milliseconds of each stage; the dashes are the matrix products' floor.

    Returns:
        A PNG.

    Raises:
        SetupError: matplotlib is not installed.
    """
    made = rows(result)
    figure = new_figure(3.6 + 1.1 * len(made), 4.2)
    axis = figure.subplots()
    handles, bottom = {}, dict.fromkeys(made, 0.0)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        if stage not in stages(result):
            continue
        heights = [1e3 * made[name][stage].wall.median for name in made]
        bars = axis.bar(list(made), heights, 0.6, bottom=list(bottom.values()), color=colour)
        handles[stage] = bars
        bottom = {n: bottom[n] + height for n, height in zip(made, heights, strict=True)}
    for number, name in enumerate(made):
        floor = 1e3 * made[name][STEP].floor
        handles["floor"] = axis.hlines(
            floor, number - 0.4, number + 0.4, colors="black", linestyles="dashed"
        )
        axis.annotate(
            f"{bottom[name]:,.0f}", (number, bottom[name]), ha="center", va="bottom", fontsize=9
        )
    about = result["about"]
    axis.set_ylabel("milliseconds a step")
    axis.set_title(f"{about['size']}, {about['batch']} utterances, {about['device']}", fontsize=10)
    axis.set_ylim(0, 1.12 * max(bottom.values()))
    add_legend(figure, dict(reversed(handles.items())))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()
