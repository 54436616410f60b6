"""Statistics of a layer's frames, and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """``norm``: mean L2 norm of a frame; ``mean`` and ``std``: over all values."""

    norm: float
    mean: float
    std: float


def layer_statistics(frames: Tensor) -> LayerStatistics:
    """Statistics of a layer's frames ``[frame, dim]``, computed in float64."""
    frames = frames.double()
    return LayerStatistics(
        frames.norm(dim=-1).mean().item(),
        frames.mean().item(),
        frames.std(correction=0).item(),
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format a table with header row 0; only the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
