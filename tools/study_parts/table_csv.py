"""docs/study.csv: all numbers of the report, also by seed."""

from __future__ import annotations

import csv
import io

from .cells import Metric
from .compare import Study
from .design import rows
from .intervals import Estimate


def as_csv(study: Study) -> str:
    """A CSV table with a line for each mean and each difference."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(
        ["kind", "size", "row", "less", "task", "metric", "condition", "seeds", "value", "low"]
        + ["high", "by_seed", "covers_seeds", "test_utterances"]
    )
    names = {row.name: (row.size, row.learned_from) for row in rows(study.setting)}
    for (row, key, condition), e in study.means.items():
        cell = study.results.cells[row, key, condition]
        size, learned_from = names.get(row, ("reference", row))
        count = sum(len(fold.names) for fold in cell.folds)
        write(["mean", size, learned_from, ""] + _columns(cell.metric, condition, e) + [count])
    for c in study.comparisons:
        numbers = _columns(c.metric, c.condition, c.estimate)
        write(["difference", c.size, c.row, c.baseline, *numbers, ""])
    return out.getvalue()


def _columns(metric: Metric, condition: str, e: Estimate) -> list:
    numbers = [f"{value:.4f}" for value in (e.value, e.low, e.high)]
    by_seed = " ".join(f"{value:.4f}" for value in e.by_seed)
    return [metric.task, metric.name, condition, len(e.by_seed), *numbers, by_seed, e.over_seeds]
