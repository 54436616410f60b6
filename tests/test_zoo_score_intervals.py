"""Intervals of zoo_scores.py: constants, a reference in loops, coverage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scores.cells import METRICS, Cell, ErrorCounts
from scores.intervals import bootstrap, mean_estimate, paired_difference

PR = next(metric for metric in METRICS if metric.task == "pr")
SID = next(metric for metric in METRICS if metric.task == "sid")

pytestmark = pytest.mark.slow  # of the developers' tools


def cell(errors, lengths=None, metric=PR, seeds=(1, 2, 3), row="r", names=None) -> Cell:
    errors = np.array(errors)
    lengths = np.full(errors.shape[1], 10) if lengths is None else np.array(lengths)
    names = names or tuple(f"u{i}" for i in range(errors.shape[1]))
    return Cell(row, metric, "clean", tuple(seeds), (ErrorCounts(names, errors, lengths),))


def test_seeds_alone_give_students_t_by_hand():
    # All utterances have the same errors, so the bootstrap has no variance. Rates 10, 20, 30 %;
    # s = 10, t(0.975, 2) = 4.302653, half width 4.302653 * 10 / sqrt(3) = 24.8413.
    estimate = mean_estimate(bootstrap(cell([[1] * 6, [2] * 6, [3] * 6])))
    assert estimate.value == pytest.approx(20)
    assert estimate.high - estimate.value == pytest.approx(24.8413, abs=1e-3)
    assert estimate.low == 0  # 20 - 24.8 is clipped
    assert estimate.by_seed == pytest.approx((10, 20, 30)) and estimate.over_seeds


def test_utterances_alone_give_the_normal_interval_by_hand():
    # Three seeds with the same errors: 0 or 10 of 10 on half of 400 utterances. The rate's standard
    # error is 50 / sqrt(400) = 2.5, half width 1.96 * 2.5 = 4.9.
    errors = [[0, 10] * 200] * 3
    estimate = mean_estimate(bootstrap(cell(errors)))
    assert estimate.value == pytest.approx(50)
    assert estimate.high - estimate.low == pytest.approx(2 * 4.9, rel=0.04)
    one = mean_estimate(bootstrap(cell(errors[:1], seeds=(1,))))
    assert not one.over_seeds and one.high - one.low == pytest.approx(estimate.high - estimate.low)


def test_accuracies_are_100_less_errors_and_clipped_at_100():
    estimate = mean_estimate(
        bootstrap(cell([[0] * 20, [0] * 19 + [1]], [1] * 20, SID, seeds=(1, 2)))
    )
    assert estimate.value == pytest.approx(97.5) and estimate.high == 100
    worst = mean_estimate(bootstrap(cell([[1] * 5, [1] * 5], [1] * 5, SID, seeds=(1, 2))))
    assert (worst.value, worst.low, worst.high) == (0, 0, 0)


def test_differences_equal_a_reference_in_loops():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 10, (3, 40)), rng.integers(2, 10, (3, 40))
    lengths = rng.integers(5, 15, 40)
    names = tuple(f"u{i}" for i in range(40))
    one, other = (bootstrap(cell(x, lengths, names=names), 3000) for x in (a, b))
    estimate = paired_difference(one, other)
    by_seed = []
    for s in range(3):
        by_seed.append(100 * (sum(a[s]) - sum(b[s])) / sum(lengths))
    assert estimate.by_seed == pytest.approx(tuple(by_seed))
    means = []
    for _ in range(3000):
        drawn = rng.integers(0, 40, 40)
        size = sum(lengths[i] for i in drawn)
        rates = [100 * sum(a[s][i] - b[s][i] for i in drawn) / size for s in range(3)]
        means.append(sum(rates) / 3)
    centre = sum(by_seed) / 3
    seeds = sum((d - centre) ** 2 for d in by_seed) / 2 / 3
    utterances = np.var(means, ddof=1)
    total = seeds + utterances
    freedom = total**2 / (seeds**2 / 2)
    # Quantile of Student's t from its density, integrated numerically
    x = np.linspace(0, 60, 600_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    cumulated = np.cumsum(density) / density.sum() / 2 + 0.5
    t = x[np.searchsorted(cumulated, 0.975)]
    assert estimate.high - estimate.value == pytest.approx(t * math.sqrt(total), rel=0.05)
    assert estimate.low + estimate.high == pytest.approx(2 * estimate.value)


def test_a_constant_difference_excludes_0_although_the_seeds_vary():
    base = np.array([[1, 4, 2, 6, 3, 5] * 5, [4, 7, 5, 9, 6, 8] * 5, [2, 5, 3, 7, 4, 6] * 5])
    a, b = bootstrap(cell(base + 1)), bootstrap(cell(base))
    assert mean_estimate(a).low < mean_estimate(b).high  # the rows overlap
    estimate = paired_difference(a, b)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((10, 10, 10))


def test_differences_need_the_same_test_set_and_common_seeds():
    a = bootstrap(cell([[1, 2], [2, 3]], seeds=(1, 2)))
    other_names = cell([[1, 2], [2, 3]], seeds=(1, 2), names=("u0", "x"))
    assert paired_difference(a, bootstrap(other_names)) is None
    assert paired_difference(a, bootstrap(cell([[1, 2], [2, 3]], seeds=(3, 4)))) is None
    hum, rain = (bootstrap(replace(a.cell, noises=noises)) for noises in ("hum", "rain"))
    assert paired_difference(hum, rain) is None and paired_difference(hum, a) is not None
    estimate = paired_difference(a, bootstrap(cell([[9, 9], [1, 1]], seeds=(5, 2))))
    assert estimate.by_seed == pytest.approx((15,))
    assert not estimate.over_seeds


def test_intervals_cover_the_mean_in_95_percent_of_trials():
    """Seeds and utterances are drawn around a known mean."""
    rng = np.random.default_rng(1)
    hits, trials = 0, 400
    for trial in range(trials):
        of_utterance = rng.normal(0, 15, 60)
        of_seed = rng.normal(0, 6, 3)  # large, so that a normal in place of t would fail
        rates = np.clip(
            50 + of_utterance[None] + of_seed[:, None] + rng.normal(0, 8, (3, 60)), 0, 100
        )
        names = tuple(f"{trial}-{i}" for i in range(60))
        estimate = mean_estimate(
            bootstrap(cell(np.round(rates), np.full(60, 100), names=names), 300)
        )
        hits += estimate.low <= 50 <= estimate.high
    assert 0.92 <= hits / trials <= 0.99
