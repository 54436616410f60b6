"""The bootstrap against analytic intervals and an implementation in plain loops."""

import statistics

import numpy as np
import pytest

from s3prl_ekd.superb import bootstrap
from s3prl_ekd.superb.bootstrap import interval, resampled_rates, share_better


def names(count):
    return [f"u{i}" for i in range(count)]


def test_equal_utterances_have_an_interval_of_width_zero():
    draws = resampled_rates(np.full((2, 30), 3), np.full(30, 4), names(30), 500)
    assert draws.shape == (2, 500) and (draws == 75).all()
    assert interval(draws[0]) == (75.0, 75.0)


def test_two_utterances_have_three_outcomes():
    # One right, one wrong: a resample is 0, 50 or 100 % wrong with probability 1/4, 1/2, 1/4.
    (draws,) = resampled_rates(np.array([[0, 1]]), np.ones(2, int), names(2), 20_000)
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [0, 50, 100]
    assert counts / 20_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert interval(draws) == (0.0, 100.0)


def test_the_interval_of_a_mean_is_the_normal_one():
    # 1,000 labels of which 20 % are wrong: sd of the rate = sqrt(p(1-p)/n), interval +- 1.96 sd.
    errors = (np.arange(1000) % 5 == 0).astype(int)[None]
    (draws,) = resampled_rates(errors, np.ones(1000, int), names(1000))
    half = 100 * 1.959964 * (0.2 * 0.8 / 1000) ** 0.5  # 2.479
    low, high = interval(draws)
    assert low == pytest.approx(20 - half, abs=0.15) and high == pytest.approx(20 + half, abs=0.15)
    assert draws.mean() == pytest.approx(20, abs=0.05)


def test_word_error_rate_weights_utterances_by_length():
    # Linearised variance of a ratio: sum((e - r*l)^2) / (sum l)^2.
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 40, 800)
    errors = rng.binomial(lengths, 0.3)
    (draws,) = resampled_rates(errors[None], lengths, names(800), 5000)
    rate = errors.sum() / lengths.sum()
    sd = 100 * np.sqrt(((errors - rate * lengths) ** 2).sum()) / lengths.sum()
    assert draws.std() == pytest.approx(sd, rel=0.05)
    assert draws.mean() == pytest.approx(100 * rate, abs=5 * sd / 5000**0.5)


def rates_in_loops(errors, lengths, drawn):
    """The error rate of each system on each resample, in plain loops."""
    rates = [[] for _ in errors]
    for draw in drawn:
        for system, counts in enumerate(errors):
            wrong = total = 0
            for utterance in draw:
                wrong += int(counts[utterance])
                total += int(lengths[utterance])
            rates[system].append(100 * wrong / total)
    return rates


def test_equals_plain_loops_over_the_same_resamples(monkeypatch):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, 13)
    errors = rng.integers(0, 9, (3, 13))
    all_drawn = []
    default_rng = np.random.default_rng

    class Spy:
        def __init__(self, seed):
            self.rng = default_rng(seed)

        def integers(self, *args, **kwargs):
            drawn = self.rng.integers(*args, **kwargs)
            all_drawn.extend(drawn.tolist())
            return drawn

    monkeypatch.setattr(bootstrap.np.random, "default_rng", Spy)
    monkeypatch.setattr(bootstrap, "_CELLS", 13 * 40)  # three blocks: 40, 40 and 20 resamples
    draws = resampled_rates(errors, lengths, names(13), 100)
    assert len(all_drawn) == 100 and all(0 <= u < 13 for draw in all_drawn for u in draw)
    assert draws == pytest.approx(np.array(rates_in_loops(errors, lengths, all_drawn)))


def test_resamples_depend_on_the_utterances_names():
    rng = np.random.default_rng(2)
    errors, lengths = rng.integers(0, 5, (2, 50)), np.full(50, 5)
    both = resampled_rates(errors, lengths, names(50), 300)
    alone = [resampled_rates(errors[i : i + 1], lengths, names(50), 300)[0] for i in (0, 1)]
    assert (both == np.stack(alone)).all()  # paired, computed together or separately
    other_names = [f"v{i}" for i in range(50)]
    independent = resampled_rates(errors, lengths, other_names, 300)
    assert abs(np.corrcoef(both[0], independent[0])[0, 1]) < 0.25


def test_paired_resamples_detect_a_small_difference():
    # Two systems that differ in 12 of 400 utterances; the first is better in all of them.
    first = (np.arange(400) % 2 == 0).astype(int)
    second = first.copy()
    second[1:25:2] = 1
    a, b = resampled_rates(np.stack([first, second]), np.ones(400, int), names(400))
    low, high = interval(a - b)
    assert high < 0 and statistics.fmean(a - b) == pytest.approx(-3, abs=0.1)
    assert interval(a)[1] > interval(b)[0]  # though the two intervals overlap
    assert share_better(a - b, higher=False) > 0.999
    assert share_better(a - b, higher=True) < 0.001


def test_a_tie_counts_as_half():
    difference = np.array([-1.0, 0.0, 0.0, 2.0])
    assert share_better(difference, higher=True) == 0.5
    assert share_better(np.array([1.0, 0.0, 3.0, 2.0]), higher=True) == 0.875
    assert share_better(np.array([1.0, 0.0, 3.0, 2.0]), higher=False) == 0.125


def test_percentiles_by_hand():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
