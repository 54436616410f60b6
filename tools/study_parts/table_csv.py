"""docs/study.csv: all numbers of the report, by seed as well."""

from __future__ import annotations

import csv
import io

from .cells import Metric
from .compare import Study
from .design import rows
from .intervals import Estimate


def as_csv(study: Study) -> str:
    """A line for each cell and each difference."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(
        ["kind", "size", "row", "less", "task", "metric", "condition", "seeds", "value", "low"]
        + ["high", "by_seed", "covers_seeds", "test_utterances"]
    )
    names = {row.name: (row.size, row.learned_from) for row in rows(study.setting)}
    for (row, key, condition), e in study.means.items():
        cell = study.found.cells[row, key, condition]
        size, learned_from = names.get(row, ("reference", row))
        count = sum(len(fold.names) for fold in cell.folds)
        write(["mean", size, learned_from, ""] + _facts(cell.metric, condition, e) + [count])
    for c in study.comparisons:
        write(["difference", c.size, c.one, c.other] + _facts(c.metric, c.condition, c.estimate)
              + [""])  # fmt: skip
    return out.getvalue()


def _facts(metric: Metric, condition: str, e: Estimate) -> list:
    numbers = [f"{value:.4f}" for value in (e.value, e.low, e.high)]
    by_seed = " ".join(f"{value:.4f}" for value in e.by_seed)
    return [metric.task, metric.name, condition, len(e.by_seed), *numbers, by_seed, e.over_seeds]
