"""Means over seeds and their differences, with intervals over seeds and test utterances.

Two things would come out otherwise in a study made anew: the test utterances, and the seeds. The
first part of the variance is that of the mean over the seeds under a bootstrap of the utterances,
drawn alike for all rows. The second is the variance between seeds, measured on the same utterances,
over their number. A bootstrap over three seeds would make that a third too small and know only ten
means, so instead the two are added and met with Student's t, whose degrees of freedom are
Satterthwaite's (1946): 2 where the seeds decide, infinite where the utterances do. What a seed does
to single utterances is in both parts, which makes the intervals a little too wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from s3prl_ekd.superb.metrics import resampled_rates

from .cells import Cell

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Draws:
    """A cell in per cent: ``by_seed`` is ``[seed]``, ``resampled`` is ``[seed, resample]``."""

    cell: Cell
    by_seed: np.ndarray
    resampled: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its 95 % interval.

    Attributes:
        by_seed: what it is the mean of.
        over_seeds: whether the interval covers other seeds, too; one seed cannot tell.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    over_seeds: bool

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference leaves 0 out."""
        return self.over_seeds and (self.low > 0 or self.high < 0)


def draw(cell: Cell, resamples: int = RESAMPLES) -> Draws:
    """Rates of a cell, and on each resample; of several folds the mean, each drawn by itself."""
    rates = np.mean([100 * f.errors.sum(1) / f.lengths.sum() for f in cell.folds], axis=0)
    drawn = np.mean(
        [resampled_rates(f.errors, f.lengths, f.names, resamples) for f in cell.folds], axis=0
    )
    if cell.metric.higher:
        rates, drawn = 100 - rates, 100 - drawn
    return Draws(cell, rates, drawn)


def mean(draws: Draws) -> Estimate:
    """The mean over the seeds; the interval stays between 0 and, for accuracies, 100."""
    low, high, over = _interval(draws.by_seed, draws.resampled.mean(0))
    high = min(high, 100.0) if draws.cell.metric.higher else high
    return Estimate(draws.by_seed.mean().item(), max(0.0, low), high, _plain(draws.by_seed), over)


def difference(one: Draws, other: Draws) -> Estimate | None:
    """``one`` less ``other``, paired by seed and by utterance; None where nothing is shared."""
    shared = [seed for seed in one.cell.seeds if seed in other.cell.seeds]
    if one.cell.test_set != other.cell.test_set or not shared:
        return None
    a = [one.cell.seeds.index(seed) for seed in shared]
    b = [other.cell.seeds.index(seed) for seed in shared]
    by_seed = one.by_seed[a] - other.by_seed[b]
    drawn = (one.resampled[a] - other.resampled[b]).mean(0)
    low, high, over = _interval(by_seed, drawn)
    return Estimate(by_seed.mean().item(), low, high, _plain(by_seed), over)


def _interval(by_seed: np.ndarray, drawn: np.ndarray) -> tuple[float, float, bool]:
    """Bounds, and whether they cover other seeds. ``drawn``: the mean on each resample."""
    value, count = by_seed.mean(), len(by_seed)
    total, freedom = drawn.var(ddof=1), math.inf
    if count > 1:
        of_seeds = by_seed.var(ddof=1) / count
        total += of_seeds
        if of_seeds > 0:
            freedom = (count - 1) * (total / of_seeds) ** 2
    margin = student_t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(total)
    return float(value - margin), float(value + margin), count > 1


def _plain(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
