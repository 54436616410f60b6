"""The table's numbers, and the differences that the question asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cells import METRICS, Metric
from .design import ENSEMBLE, NONE, Row, Setting, rows
from .intervals import RESAMPLES, Estimate, difference, draw, mean
from .scores import Found

AVERAGE = "average"


@dataclass(frozen=True)
class Comparison:
    """One row less another of the same size; positive is not always better, see ``better``."""

    size: str
    metric: Metric
    condition: str
    one: str
    other: str
    best_single: bool  # whether ``other`` is the single teacher that was best on dev
    estimate: Estimate

    @property
    def control(self) -> bool:
        """Whether it asks if distillation has taught anything: average less none."""
        return self.other == NONE

    @property
    def difference(self) -> str:
        """``average − best single``."""
        return f"{self.one} − {'best single' if self.best_single else self.other}"

    @property
    def better(self) -> bool:
        """Whether ``one`` has the better mean."""
        return (self.estimate.value > 0) == self.metric.higher and self.estimate.value != 0


@dataclass(frozen=True)
class Study:
    """All numbers of a report.

    Attributes:
        means: (row, metric's key, condition) -> mean.
        comparisons: best single first, then against average.
        best: (size, task) -> the single teacher whose students are best on dev; None: several are.
    """

    setting: Setting
    found: Found
    means: dict[tuple[str, str, str], Estimate]
    comparisons: tuple[Comparison, ...]
    best: dict[tuple[str, str], str | None]

    @property
    def whole(self) -> int:
        """Cells of the students that have all seeds."""
        names = {row.name for row in rows(self.setting)}
        return sum(
            len(cell.seeds) == len(self.setting.seeds)
            for (row, _, _), cell in self.found.cells.items()
            if row in names
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in METRICS if metric.task in self.setting.tasks)


def make_study(setting: Setting, found: Found, resamples: int = RESAMPLES) -> Study:
    """Means, and differences: of the ensembles to the best single teacher and to average, and of
    average to no teacher.

    The best single teacher is chosen by dev, on which no number of the table is measured: chosen
    by the test set, it would look better than it is. A little too good it still looks, as the seeds
    that are lucky on dev are so on the test set. Where single teachers tie there, as they do
    while dev has nothing but errors, none is best and nothing is compared with it.
    """
    drawn = {key: draw(cell, resamples) for key, cell in found.cells.items()}
    best = {}
    for size in setting.sizes:
        for task in setting.tasks:
            devs = {name: found.dev.get((Row(size, name).name, task)) for name in setting.teachers}
            if None not in devs.values():
                best[size, task] = _best(devs, task)
    comparisons = []
    for size in setting.sizes:
        for metric in METRICS:
            for condition in found.conditions:
                for one, other in _pairs(best.get((size, metric.task))):
                    a = drawn.get((Row(size, one).name, metric.key, condition))
                    b = drawn.get((Row(size, other).name, metric.key, condition))
                    estimate = difference(a, b) if a and b else None
                    if estimate:
                        facts = (size, metric, condition, one, other, other in setting.teachers)
                        comparisons.append(Comparison(*facts, estimate))
    means = {key: mean(draws) for key, draws in drawn.items()}
    return Study(setting, found, means, tuple(comparisons), best)


def _pairs(best: str | None) -> Sequence[tuple[str, str]]:
    against_best = [(one, best) for one in ENSEMBLE] if best else []
    against_average = [(one, AVERAGE) for one in ENSEMBLE if one != AVERAGE]
    return [*against_best, *against_average, (AVERAGE, NONE)]


def _best(devs: Mapping[str, float], task: str) -> str | None:
    """Best on dev, clean, over the seeds; None where several are."""
    higher = next(metric.higher for metric in METRICS if metric.task == task)
    top = (max if higher else min)(devs.values())
    names = [name for name, value in devs.items() if math.isclose(value, top, abs_tol=1e-9)]
    return names[0] if len(names) == 1 else None
