"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import printable


def text_table(
    rows: Sequence[Sequence[str]], *, numbers: bool = True, rule: bool = False
) -> list[str]:
    """The lines of a table with aligned columns, two spaces apart.

    Args:
        rows: cells without line breaks.
        numbers: align all columns but the first to the right.
        rule: underline the first row, the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [list(row) for row in rows]
    if rule:
        cells.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header. Markup in cells is escaped."""
    rows = [[printable(c).replace("|", "\\|").replace("<", "&lt;") for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
