"""Percentile bootstrap intervals over the units of a test set.

(Efron 1979; for word error rates Bisani and Ney, ICASSP 2004): units, mostly utterances, are
resampled with replacement, the metric is computed on each resample, and quantiles of these values
are the interval's bounds. Systems that are compared share the same resamples. scipy's bootstrap
would be as long, and ``report`` needs no scipy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..downstream.metrics.error_counts import ErrorCounts
from ..downstream.metrics.sample import Sample

RESAMPLES = 10_000
_CELLS = 2_000_000  # size of a block [resample, unit]: about 50 MB


def _drawn(names: Sequence[str], resamples: int) -> Iterator[np.ndarray]:
    """Yield blocks ``[resample, unit]`` of how often each unit is drawn.

    They depend on ``names`` alone. So results on the same units are paired (other systems, other
    tasks, the same speech under noise), and different test sets are resampled independently.
    """
    count = len(names)
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    rng = np.random.default_rng([0, int.from_bytes(digest[:8], "big")])
    block = max(1, _CELLS // count)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        yield weights.astype(np.float64)


def resampled_values(samples: Sequence[Sample], resamples: int = RESAMPLES) -> np.ndarray:
    """Compute a metric on bootstrap resamples of the units.

    Args:
        samples: one for each system, all with the same units.

    Returns:
        The metric in per cent, ``[system, resample]``.
    """
    blocks = [
        np.stack([sample.values(weights) for sample in samples])
        for weights in _drawn(samples[0].names, resamples)
    ]
    return np.concatenate(blocks, axis=1)


def resampled_rates(
    errors: np.ndarray, lengths: np.ndarray, names: Sequence[str], resamples: int = RESAMPLES
) -> np.ndarray:
    """Compute the error rate of each system on bootstrap resamples of the utterances.

    Args:
        errors: ``[system, utterance]``.
        lengths: reference tokens, ``[utterance]``, each at least 1.

    Returns:
        Error rates in per cent, ``[system, resample]``.
    """
    samples = [ErrorCounts(tuple(names), row, lengths) for row in errors]
    return resampled_values(samples, resamples)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The interval with the central 95 % of ``values`` ``[resample]``; NaN are left out.

    NaN is the EER of a resample without trials of one kind, or the CER of one without slots.
    """
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def share_better(difference: np.ndarray, *, higher: bool) -> float:
    """The fraction of resamples in which the first system is better; a tie counts as half.

    ``difference`` is its metric minus the second's, ``[resample]``; ``higher``: higher is better.
    """
    difference = difference[~np.isnan(difference)]
    wins = difference > 0 if higher else difference < 0
    return float(wins.mean() + 0.5 * (difference == 0).mean())


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric or score, and its values on the resamples of the test set, ``[resample]``."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of ``value``."""
        return interval(self.resampled)
