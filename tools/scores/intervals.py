"""Means over seeds and their differences, with confidence intervals over seeds and utterances.

The variance is the sum of two parts. The first is the variance of the mean over the seeds under a
bootstrap of the test utterances, with the same resamples for all rows. The second is the variance
between seeds, on the same utterances, divided by their number. (A bootstrap over three seeds would
make the second a third too small and have only ten distinct means.) The interval is Student's t
with Satterthwaite's (1946) degrees of freedom: 2 for three seeds if the seeds dominate, infinite if
the utterances do. Variation of a seed on single utterances is in both parts, so the intervals are a
little too wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from s3prl_ekd.superb.bootstrap import resampled_rates

from .cells import Cell

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class BootstrapRates:
    """Rates of a cell in per cent: ``by_seed [seed]``, ``resampled [seed, resample]``."""

    cell: Cell
    by_seed: np.ndarray
    resampled: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its 95 % interval.

    Attributes:
        by_seed: the values of the seeds; ``value`` is their mean.
        over_seeds: whether the interval includes the variation between seeds; False for one seed.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    over_seeds: bool


def bootstrap(cell: Cell, resamples: int = RESAMPLES) -> BootstrapRates:
    """Compute a cell's rates on all utterances and on each resample.

    Folds are resampled independently; the rate is the mean over the folds.
    """
    rates = np.mean([100 * f.errors.sum(1) / f.lengths.sum() for f in cell.folds], axis=0)
    resampled = np.mean(
        [resampled_rates(f.errors, f.lengths, f.names, resamples) for f in cell.folds], axis=0
    )
    if cell.metric.higher:
        rates, resampled = 100 - rates, 100 - resampled
    return BootstrapRates(cell, rates, resampled)


def mean_estimate(rates: BootstrapRates) -> Estimate:
    """Mean over the seeds; the interval is clipped at 0 and, for accuracies, at 100."""
    by_seed = rates.by_seed
    low, high, over_seeds = _interval(by_seed, rates.resampled.mean(0))
    high = min(high, 100.0) if rates.cell.metric.higher else high
    return Estimate(by_seed.mean().item(), max(0.0, low), high, _floats(by_seed), over_seeds)


def paired_difference(a: BootstrapRates, b: BootstrapRates) -> Estimate | None:
    """``a`` less ``b``, paired by seed and utterance.

    Returns:
        None if they have no common seed, different test utterances or different noises.
    """
    common = [seed for seed in a.cell.seeds if seed in b.cell.seeds]
    noises = {a.cell.noises, b.cell.noises} - {None}
    if a.cell.test_set != b.cell.test_set or len(noises) > 1 or not common:
        return None
    a_rows = [a.cell.seeds.index(seed) for seed in common]
    b_rows = [b.cell.seeds.index(seed) for seed in common]
    by_seed = a.by_seed[a_rows] - b.by_seed[b_rows]
    resampled = (a.resampled[a_rows] - b.resampled[b_rows]).mean(0)
    low, high, over_seeds = _interval(by_seed, resampled)
    return Estimate(by_seed.mean().item(), low, high, _floats(by_seed), over_seeds)


def _interval(by_seed: np.ndarray, resampled: np.ndarray) -> tuple[float, float, bool]:
    """Return (low, high, whether they include the variation between seeds).

    Args:
        by_seed: ``[seed]``.
        resampled: mean over the seeds, ``[resample]``.
    """
    value, count = by_seed.mean(), len(by_seed)
    variance, freedom = resampled.var(ddof=1), math.inf
    if count > 1:
        seed_variance = by_seed.var(ddof=1) / count
        variance += seed_variance
        if seed_variance > 0:
            freedom = (count - 1) * (variance / seed_variance) ** 2
    margin = student_t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(variance)
    return float(value - margin), float(value + margin), count > 1


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
