"""A task's metric on the test set, with its resamples: mean over seeds, for ER also over folds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..downstream.tasks import TASKS
from ..errors import DataError
from .bootstrap import RESAMPLES, interval, resampled_rates
from .results import Selection
from .scores import Counts, count_run


@dataclass(frozen=True, eq=False)
class Measure:
    """The metric of one upstream and task under one condition, in per cent.

    Attributes:
        by_seed: the metric of each seed alone; ``value`` is their mean.
        resampled: ``[resample]``, ``value`` on each draw of the utterances.
        utterances: in the test set, all folds together.
        test_set: :func:`test_set` of its folds.
    """

    selection: Selection
    condition: str
    value: float
    by_seed: tuple[float, ...]
    resampled: np.ndarray
    utterances: int
    test_set: tuple

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of ``value``."""
        return interval(self.resampled)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None where there is one."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, eq=False)
class Fold:
    """What the seeds of an upstream made of one test set.

    Attributes:
        names: ``[utterance]``.
        lengths: ``[utterance]``, as in :class:`Counts`.
        errors: ``[seed, utterance]``.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    errors: np.ndarray


def test_set(folds: Sequence[Fold]) -> tuple:
    """Equal for folds of the same utterances and references: only then are draws paired."""
    return tuple((fold.names, fold.lengths.tobytes()) for fold in folds)


def measure(
    selections: Sequence[Selection], condition: str, resamples: int = RESAMPLES
) -> list[Measure]:
    """Measure the upstreams that were tested under ``condition``, all of one task.

    A fold's rate is over all of its utterances (errors / reference tokens); ER is the mean of its
    folds' accuracies, as SUPERB takes it, and each fold is resampled by itself.

    Raises:
        DataError: predictions are missing or damaged, or the seeds of one upstream were tested on
            different utterances.
    """
    tested = [s for s in selections if all(condition in run.tested for run in s.runs)]
    folds = [_folds(selection, condition) for selection in tested]
    alike: dict[tuple, list[int]] = {}  # test set -> which of `tested`
    for i, group in enumerate(folds):
        alike.setdefault(test_set(group), []).append(i)
    found: dict[int, Measure] = {}
    for key, members in alike.items():
        # All systems of one test set at once: drawing costs more than counting.
        drawn, rates = [], []
        for stack in zip(*(folds[i] for i in members), strict=True):
            first, errors = stack[0], np.concatenate([fold.errors for fold in stack])
            drawn.append(resampled_rates(errors, first.lengths, first.names, resamples))
            rates.append(100 * errors.sum(1) / first.lengths.sum())
        by_draw, by_system = np.mean(drawn, axis=0), np.mean(rates, axis=0)
        start = 0
        for i in members:
            end = start + len(folds[i][0].errors)
            seeds, draws = by_system[start:end], by_draw[start:end].mean(axis=0)
            if TASKS[tested[i].task].metric == "acc":
                seeds, draws = 100 - seeds, 100 - draws
            found[i] = Measure(
                selection=tested[i],
                condition=condition,
                value=float(seeds.mean()),
                by_seed=tuple(float(value) for value in seeds),
                resampled=draws,
                utterances=sum(len(fold.names) for fold in folds[i]),
                test_set=key,
            )
            start = end
    return [found[i] for i in range(len(tested))]


def _folds(selection: Selection, condition: str) -> list[Fold]:
    found = []
    for name in selection.folds:
        runs = [run for run in selection.runs if run.fold == name]
        counts: list[Counts] = [count_run(run, condition) for run in runs]
        first = counts[0]
        for run, other in zip(runs[1:], counts[1:], strict=True):
            if other.names != first.names or (other.lengths != first.lengths).any():
                raise DataError(
                    f"{runs[0].folder} and {run.folder} were not tested on the same utterances "
                    f"({condition}); evaluate them on one test set"
                )
        errors = np.stack([count.errors for count in counts])
        found.append(Fold(first.names, first.lengths, errors))
    return found
