"""Figures of matplotlib, without a display."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..errors import SetupError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> tuple[Any, Any]:
    """Import matplotlib's canvas without a display, and its figure.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("plots need matplotlib; type: pip install matplotlib") from None
    return FigureCanvasAgg, Figure


def new_figure(width: float, height: float) -> Figure:
    """Create a figure of a size in inches, without a display."""
    canvas, figure_class = require_matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the contents of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()
