"""Bootstrap over utterances: how far a rate would move on another draw of the test set.

Percentile intervals (Efron 1979; for word error rates Bisani and Ney, ICASSP 2004): utterances are
drawn with replacement, the rate of the whole set is computed on each draw, and quantiles over the
draws bound the interval. Systems that are compared see the same draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
_CELLS = 2_000_000  # of [resample, utterance] at a time: about 50 MB


def resampled_rates(
    errors: np.ndarray,
    lengths: np.ndarray,
    names: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Per cent of errors of each system on each resample of the utterances.

    The draws depend on ``names`` and ``seed`` alone: whatever was tested on the same utterances
    (other systems, other tasks, the same speech under noise) is compared on the same draws, and
    other test sets are drawn independently.

    Args:
        errors: ``[system, utterance]``.
        lengths: ``[utterance]``, each at least 1.
        names: ``[utterance]``.
        resamples: how many draws.

    Returns:
        ``[system, resample]``.
    """
    count = len(names)
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    columns = np.concatenate([errors, lengths[None]]).T.astype(np.float64)  # (utterance, system+1)
    sums = []
    for start in range(0, resamples, max(1, _CELLS // count)):
        rows = min(max(1, _CELLS // count), resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(times.astype(np.float64) @ columns)  # (resample, system+1)
    total = np.concatenate(sums)
    return 100 * (total[:, :-1] / total[:, -1:]).T


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central ``level`` of ``values`` ``[resample]``: its percentile interval."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_better(difference: np.ndarray, *, higher: bool) -> float:
    """Share of resamples in which a difference is for the better; a tie counts as half of one.

    Args:
        difference: ``[resample]``.
        higher: whether a higher value is the better one.
    """
    wins = difference > 0 if higher else difference < 0
    return float(wins.mean() + 0.5 * (difference == 0).mean())
