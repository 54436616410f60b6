"""Means of the table and the differences between rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cells import METRICS, Metric
from .design import ENSEMBLES, NONE, StudyRow, StudySetting, rows
from .intervals import RESAMPLES, Estimate, bootstrap, mean_estimate, paired_difference
from .scores import StudyResults

AVERAGE = "average"


@dataclass(frozen=True)
class RowComparison:
    """Difference of two rows of the same size: ``row`` less ``baseline``.

    Attributes:
        is_best_single: whether ``baseline`` is the single teacher that was best on dev.
    """

    size: str
    metric: Metric
    condition: str
    row: str
    baseline: str
    is_best_single: bool
    estimate: Estimate

    @property
    def is_control(self) -> bool:
        """Whether the baseline is the student without distillation."""
        return self.baseline == NONE

    @property
    def label(self) -> str:
        """Name of the difference, such as ``average − best single``."""
        return f"{self.row} − {'best single' if self.is_best_single else self.baseline}"

    @property
    def improves(self) -> bool:
        """Whether ``row`` has the better mean; higher or lower, depending on the metric."""
        return (self.estimate.value > 0) == self.metric.higher and self.estimate.value != 0


@dataclass(frozen=True)
class Study:
    """All numbers of the report.

    Attributes:
        means: (row, metric's key, condition) -> mean.
        comparisons: with the best single teacher first, then with average, then with none.
        best: (size, task) -> the single teacher whose students are best on dev; None: a tie.
    """

    setting: StudySetting
    results: StudyResults
    means: dict[tuple[str, str, str], Estimate]
    comparisons: tuple[RowComparison, ...]
    best: dict[tuple[str, str], str | None]

    @property
    def complete_cells(self) -> int:
        """Number of the students' cells that have all seeds."""
        names = {row.name for row in rows(self.setting)}
        return sum(
            len(cell.seeds) == len(self.setting.seeds)
            for (row, _, _), cell in self.results.cells.items()
            if row in names
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in METRICS if metric.task in self.setting.tasks)


def make_study(setting: StudySetting, results: StudyResults, resamples: int = RESAMPLES) -> Study:
    """Compute the means and the differences.

    The ensembles are compared with the best single teacher and with average; average is compared
    with no teacher. The best single teacher is chosen on dev, since a choice on the test set would
    favour it. It is still favoured a little: a seed that is lucky on dev tends to be lucky on the
    test set too. If single teachers tie on dev (all of them have only errors, for example), none is
    best and there is no comparison with it.
    """
    rates = {key: bootstrap(cell, resamples) for key, cell in results.cells.items()}
    best = {}
    for size in setting.sizes:
        for task in setting.tasks:
            devs = {
                name: results.dev.get((StudyRow(size, name).name, task))
                for name in setting.teachers
            }
            if None not in devs.values():
                best[size, task] = _best(devs, task)
    comparisons = []
    for size in setting.sizes:
        for metric in METRICS:
            for condition in results.conditions:
                for row, baseline in _pairs(best.get((size, metric.task))):
                    a = rates.get((StudyRow(size, row).name, metric.key, condition))
                    b = rates.get((StudyRow(size, baseline).name, metric.key, condition))
                    estimate = paired_difference(a, b) if a and b else None
                    if estimate:
                        is_single = baseline in setting.teachers
                        fields = (size, metric, condition, row, baseline, is_single)
                        comparisons.append(RowComparison(*fields, estimate))
    means = {key: mean_estimate(cell_rates) for key, cell_rates in rates.items()}
    return Study(setting, results, means, tuple(comparisons), best)


def _pairs(best: str | None) -> Sequence[tuple[str, str]]:
    against_best = [(row, best) for row in ENSEMBLES] if best else []
    against_average = [(row, AVERAGE) for row in ENSEMBLES if row != AVERAGE]
    return [*against_best, *against_average, (AVERAGE, NONE)]


def _best(devs: Mapping[str, float], task: str) -> str | None:
    """The teacher that is best on clean dev, averaged over the seeds; None for a tie."""
    higher = next(metric.higher for metric in METRICS if metric.task == task)
    top = (max if higher else min)(devs.values())
    names = [name for name, value in devs.items() if math.isclose(value, top, abs_tol=1e-9)]
    return names[0] if len(names) == 1 else None
