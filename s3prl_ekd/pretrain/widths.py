"""A picture of the widths of a student that is being pruned, or was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..distill.student_settings import Unit
from ..system.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES: dict[Unit, str] = {
    "conv": "conv channels",
    "heads": "attention heads",
    "ffn": "feed-forward units",
    "attention": "attention modules",
    "feed_forward": "feed-forward modules",
}


def draw_widths(
    kept: Mapping[Unit, Sequence[float]], total: Mapping[Unit, Sequence[float]]
) -> Figure:
    """Draw a panel for each kind of unit, with a bar for each layer: kept of total units.

    Raises:
        SetupError: matplotlib is not installed.
    """
    figure = new_figure(3.2 * len(kept), 2.6)
    axes = figure.subplots(1, len(kept), squeeze=False)[0]
    for axis, (unit, widths) in zip(axes, kept.items(), strict=True):
        layers = range(1, len(widths) + 1)
        axis.bar(layers, total[unit], color="#d9d9d9", label="removed")
        axis.bar(layers, widths, color="#3b6ea5", label="kept")
        axis.set(title=TITLES[unit], xlabel="layer")
        axis.set_xticks([layer for layer in layers if len(layers) <= 12 or layer % 4 == 0])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure
