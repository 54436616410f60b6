"""Compute the metrics of a task from the predictions of its runs, with bootstrap intervals.

A task's metric is the mean over seeds, for ER also over folds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..downstream.metrics.sample import Sample
from ..downstream.tasks import TASKS
from ..errors import DataError
from .bootstrap import RESAMPLES, Estimate, resampled_values
from .results import FinishedRun, SelectedRuns


@dataclass(frozen=True, eq=False)
class TaskMetric(Estimate):
    """A metric of one upstream and task under one condition, in per cent."""

    column: str  # see :data:`..downstream.tasks.COLUMNS`
    selection: SelectedRuns
    by_seed: tuple[float, ...]  # ``value`` is their mean
    units: int  # of all folds together: utterances, for some tasks recordings, speakers or queries
    test_set: tuple  # see :func:`test_set`
    noises: str | None  # see :func:`noise_digest`

    def is_comparable(self, other: TaskMetric) -> bool:
        """Whether test set, noises and recipe are the same, as far as the records tell."""
        recipes = {self.selection.recipe_digest, other.selection.recipe_digest} - {None}
        noises = {self.noises, other.noises} - {None}
        return self.test_set == other.test_set and len(recipes) <= 1 and len(noises) <= 1

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None


def test_set(folds: Sequence[Sample]) -> tuple:
    """Key of the units and references; equal keys mean paired resamples."""
    return tuple((fold.names, fold.reference) for fold in folds)


def noise_digest(runs: Iterable[FinishedRun], condition: str) -> str | None:
    """The digest of the noises of ``condition``; None if no record has it.

    Raises:
        DataError: runs were tested with different noises.
    """
    first: dict[str, FinishedRun] = {}
    for run in runs:
        if condition in run.noises:
            first.setdefault(run.noises[condition], run)
    if len(first) > 1:
        a, b, *_ = (run.folder / run.tested[condition] for run in first.values())
        raise DataError(
            f"{a} and {b} are tests with different noises of the same name; remove one of these "
            "folders, and run superb again with the noises of the other"
        )
    return next(iter(first), None)


def compute_metrics(
    selections: Sequence[SelectedRuns], condition: str, resamples: int = RESAMPLES
) -> list[TaskMetric]:
    """Compute one task's metrics for each upstream that was tested under ``condition``.

    A fold's metric is over all of its units. ER is the mean of the folds' accuracies, as in
    SUPERB. Each fold is resampled separately.

    Raises:
        DataError: predictions are missing or damaged, or the seeds of one upstream were tested on
            different utterances or labels, or with different noises.
    """
    tested = [s for s in selections if all(condition in run.tested for run in s.runs)]
    if not tested:
        return []
    noises = [noise_digest(selection.runs, condition) for selection in tested]
    columns = TASKS[tested[0].task].columns
    folds = [[_measure(s, fold, condition) for fold in s.folds] for s in tested]
    return [
        metric
        for index, column in enumerate(columns)
        for metric in _column(
            column,
            tested,
            [[seeds[index] for seeds in group] for group in folds],
            noises,
            resamples,
        )
    ]


def _column(
    column: str,
    tested: Sequence[SelectedRuns],
    folds: Sequence[Sequence[Sequence[Sample]]],
    noises: Sequence[str | None],
    resamples: int,
) -> Iterator[TaskMetric]:
    """One metric of all systems; ``folds``: system -> fold -> the sample of each seed."""
    test_sets = [test_set([seeds[0] for seeds in group]) for group in folds]
    resampled: dict[int, np.ndarray] = {}  # system -> [resample]
    for key in dict.fromkeys(test_sets):
        # all systems of one test set at once: drawing costs more than summing
        members = [i for i, other in enumerate(test_sets) if other == key]
        drawn = [
            resampled_values([sample for i in members for sample in folds[i][fold]], resamples)
            for fold in range(len(key))
        ]  # [system and seed, resample]
        ends = np.cumsum([len(folds[i][0]) for i in members])[:-1]
        for i, rows in zip(members, np.split(np.mean(drawn, axis=0), ends), strict=True):
            resampled[i] = rows.mean(axis=0)
    for i, (selection, group) in enumerate(zip(tested, folds, strict=True)):
        by_seed = np.mean([[sample.value for sample in seeds] for seeds in group], axis=0)
        yield TaskMetric(
            value=float(by_seed.mean()),
            resampled=resampled[i],
            column=column,
            selection=selection,
            by_seed=tuple(by_seed.tolist()),
            units=sum(len(seeds[0].names) for seeds in group),
            test_set=test_sets[i],
            noises=noises[i],
        )


def _measure(selection: SelectedRuns, fold: str | None, condition: str) -> list[tuple[Sample, ...]]:
    """The samples of one fold: metric -> one for each seed."""
    runs = [run for run in selection.runs if run.fold == fold]
    by_seed = [run.measure(condition) for run in runs]
    for run, samples in zip(runs, by_seed, strict=True):
        if test_set(samples) != test_set(by_seed[0]):
            raise DataError(
                f"{runs[0].folder} and {run.folder} were tested on different utterances or labels "
                f"({condition}); evaluate both on the same test set"
            )
    return list(zip(*by_seed, strict=True))
