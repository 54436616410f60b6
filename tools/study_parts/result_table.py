"""Results of runs, a JSON file each: read them, and write them as CSV and as cells of a table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder, in the order of their files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def write_csv(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write all values, a row for each result."""
    names = dict.fromkeys(name for result in results for name in result)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names], lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; empty without values."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if mean > 1000:
        return f"{mean:,.0f}"
    digits = 3 if mean < 5 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"
