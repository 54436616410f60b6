"""From results to hypotheses: normalised scores, paired contrasts, intervals, multiplicity.

The normalised score of a student is its share of the way from the untrained student (0) to the best
probe of a teacher (1), averaged over phone frames, clean, and speakers under noise. A contrast is
computed within each seed (rows of a seed share first weights, data and distortion), so its spread
over seeds is that of the difference. Its variance also has a part for other speakers, from a
bootstrap of the test speakers. Intervals are Student's t with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from s3prl_ekd.probe.measure import CLEAN

from .results import NOISY, StudyResult
from .rows import AVERAGE_HEADS, SETS, SINGLES, Row, set_name

PRIMARY = (("phone frames", CLEAN), ("speaker", NOISY))
RESAMPLES = 1000
EQUIVALENCE = 0.1  # of the way from the untrained student to the best teacher
DEV_SHARE = 5  # one speaker in five chooses the best single teacher, and is not tested


@dataclass(frozen=True)
class ContrastEstimate:
    """A contrast of normalised scores.

    Attributes:
        value: mean over the seeds; ``by_seed`` has each.
        low, high: 95 % interval.
        p: two-sided, of the value 0.
        equivalent: the 90 % interval is inside ±:data:`EQUIVALENCE` (two one-sided tests at 5 %).
        deviation: standard deviation over seeds.
        detectable: smallest true value that is found in 80 % of such studies (two-sided, 5 %).
    """

    value: float
    low: float
    high: float
    p: float
    equivalent: bool
    by_seed: tuple[float, ...]
    deviation: float
    detectable: float


class Scores:
    """Accuracies of all results on resamples of the test speakers.

    Args:
        results: of students, teachers and sets.
    """

    def __init__(self, results: Sequence[StudyResult]):
        self.students = {(r.row, r.seed): r for r in results if r.seed > 0}
        self.teachers = {r.row: r for r in results if r.seed == 0}
        speakers = sorted({s for r in results for counts in r.scores.values() for s in counts})
        self.dev = set(speakers[::DEV_SHARE])
        self.tested = [s for s in speakers if s not in self.dev]
        draws = np.random.default_rng(0).integers(
            len(self.tested), size=(RESAMPLES, len(self.tested))
        )
        weights = np.stack([np.bincount(d, minlength=len(self.tested)) for d in draws])
        self.weights = np.concatenate([np.ones((1, len(self.tested))), weights])
        self._cache: dict[tuple, np.ndarray] = {}

    def seeds(self, rows: Sequence[str]) -> list[int]:
        """Seeds for which all of ``rows`` have results."""
        all_seeds = sorted({seed for _, seed in self.students})
        return [s for s in all_seeds if all((row, s) in self.students for row in rows)]

    def accuracy(self, result: StudyResult, score: tuple[str, str]) -> np.ndarray:
        """Per cent on the test speakers, then on each resample of them: ``[1 + resample]``."""
        key = (result.row, result.seed, score)
        if key not in self._cache:
            counts = result.scores[score]
            table = np.array([counts.get(speaker, (0, 0)) for speaker in self.tested])
            errors, examples = (self.weights @ table).T
            self._cache[key] = 100 - 100 * errors / np.maximum(examples, 1)
        return self._cache[key]

    def normalised(
        self, row: str, seed: int, scores: Sequence[tuple[str, str]] = PRIMARY
    ) -> np.ndarray:
        """Normalised score of a student, ``[1 + resample]``."""
        parts = []
        for score in scores:
            low, high = self.span(score)
            parts.append((self.accuracy(self.students[row, seed], score) - low) / (high - low))
        return np.mean(parts, axis=0)

    def span(self, score: tuple[str, str]) -> tuple[float, float]:
        """Mean accuracy of the untrained students, and that of the best teacher's own probe."""
        untrained = [r for (row, _), r in self.students.items() if row == "none"]
        low = float(np.mean([self.accuracy(r, score)[0] for r in untrained]))
        singles = [self.teachers[name] for name in SINGLES if name in self.teachers]
        return low, max(float(self.accuracy(r, score)[0]) for r in singles)

    def best_single(self, teachers: tuple[str, ...]) -> str:
        """The teacher whose students have the best normalised score on the dev speakers."""

        def dev_score(row: str) -> float:
            values = []
            for seed in self.seeds([row]):
                for score in PRIMARY:
                    low, high = self.span(score)
                    counts = self.students[row, seed].scores[score]
                    table = np.array([counts[s] for s in counts if s in self.dev])
                    errors, examples = table.sum(0)
                    values.append((100 - 100 * errors / examples - low) / (high - low))
            return float(np.mean(values)) if values else -math.inf

        return max(teachers, key=dev_score)

    def headroom(self, teachers: tuple[str, ...]) -> float:
        """Points by which the probe of all teachers exceeds the best single one's, mean over the
        primary scores."""
        together = self.teachers[set_name(teachers)]
        gains = [
            self.accuracy(together, score)[0]
            - max(self.accuracy(self.teachers[name], score)[0] for name in teachers)
            for score in PRIMARY
        ]
        return float(np.mean(gains))


def estimate(values: np.ndarray) -> ContrastEstimate:
    """Estimate a contrast from ``[seed, 1 + resample]``; two seeds or more.

    The first column has the values on all test speakers, the others those on resamples.
    """
    by_seed = values[:, 0]
    count, value = len(by_seed), float(by_seed.mean())
    seed_variance = by_seed.var(ddof=1) / count
    speaker_variance = values[:, 1:].mean(0).var(ddof=1)
    error = max(math.sqrt(seed_variance + speaker_variance), 1e-12)
    freedom = math.inf if seed_variance == 0 else (count - 1) * (error**2 / seed_variance) ** 2
    margin = student_t.ppf(0.975, freedom) * error
    one_sided = student_t.ppf(0.95, freedom) * error
    return ContrastEstimate(
        value,
        value - margin,
        value + margin,
        float(2 * student_t.sf(abs(value) / error, freedom)),
        bool(abs(value) + one_sided < EQUIVALENCE),
        tuple(float(v) for v in by_seed),
        float(by_seed.std(ddof=1)),
        float((student_t.ppf(0.975, freedom) + student_t.ppf(0.8, freedom)) * error),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected


@dataclass(frozen=True)
class Hypothesis:
    """A question with its contrast.

    Attributes:
        key: short name, for tables.
        question: one line.
        rows: rows of students that it needs.
        contrast: seed -> values ``[1 + resample]``.
    """

    key: str
    question: str
    rows: tuple[str, ...]
    contrast: Callable[[int], np.ndarray]


def hypotheses(scores: Scores) -> list[Hypothesis]:
    """The hypotheses, with the best single teachers chosen on the dev speakers."""
    siblings, plain, different, control = SETS

    def row(teachers: tuple[str, ...], combination: str) -> str:
        return Row(teachers, combination).name

    def mean(*names: str, only: Sequence[tuple[str, str]] = PRIMARY):
        return lambda seed: np.mean([scores.normalised(n, seed, only) for n in names], axis=0)

    def difference(first, second) -> Callable[[int], np.ndarray]:
        return lambda seed: first(seed) - second(seed)

    best = {teachers: scores.best_single(teachers) for teachers in SETS}
    heads = row(different, "separate")
    average, concat = (
        tuple(row(teachers, combination) for teachers in (different, plain))
        for combination in ("average", "concat")
    )
    both = row(different, AVERAGE_HEADS)
    sets = [s for s in SETS if set_name(s) in scores.teachers]
    doses = np.array([scores.headroom(teachers) for teachers in sets])

    def slope(seed: int) -> np.ndarray:
        gains = np.stack(
            [
                scores.normalised(row(teachers, "separate"), seed)
                - scores.normalised(best[teachers], seed)
                for teachers in sets
            ]
        )
        centred = doses - doses.mean()
        return centred @ gains / (centred @ centred)

    clean = [(score, CLEAN) for score, _ in PRIMARY]
    noisy = [(score, NOISY) for score, _ in PRIMARY]
    robust = row(plain, "separate")
    found = [
        Hypothesis(
            "H1",
            f"heads for {set_name(different)} - {best[different]} alone",
            (heads, best[different]),
            difference(mean(heads), mean(best[different])),
        ),
        Hypothesis(
            "H1b",
            "gain of heads over the best single teacher, per point of headroom",
            tuple(r for s in sets for r in (row(s, "separate"), best[s])),
            slope,
        ),
        Hypothesis(
            "H2",
            "average - concat, two sets",
            (*average, *concat),
            difference(mean(*average), mean(*concat)),
        ),
        Hypothesis(
            "H3",
            "average and heads - average",
            (both, average[0]),
            difference(mean(both), mean(average[0])),
        ),
        Hypothesis(
            "H4",
            f"{set_name(plain)} - hubert: under noise less clean",
            (robust, "hubert"),
            difference(
                difference(mean(robust, only=noisy), mean("hubert", only=noisy)),
                difference(mean(robust, only=clean), mean("hubert", only=clean)),
            ),
        ),
        Hypothesis(
            "H5",
            "average in a common basis (PHI-S, Procrustes) - average",
            (row(different, "average, phi_s"), row(different, "average, procrustes"), average[0]),
            difference(
                mean(row(different, "average, phi_s"), row(different, "average, procrustes")),
                mean(average[0]),
            ),
        ),
        Hypothesis(
            "control",
            f"heads for {set_name(control)} - {best[control]} alone",
            (row(control, "separate"), best[control]),
            difference(mean(row(control, "separate")), mean(best[control])),
        ),
        Hypothesis(
            "distillation",
            "hubert - no training",
            ("hubert", "none"),
            difference(mean("hubert"), mean("none")),
        ),
    ]
    if len(set(doses.tolist())) < 2:  # no slope without different headrooms
        found = [hypothesis for hypothesis in found if hypothesis.key != "H1b"]
    return found


CORRECTED = ("H1", "H1b", "H2", "H3", "H4", "H5")


def estimate_hypotheses(scores: Scores) -> dict[str, tuple[Hypothesis, ContrastEstimate]]:
    """Estimate each hypothesis for which two seeds or more have all rows."""
    tested = {}
    for hypothesis in hypotheses(scores):
        seeds = scores.seeds(hypothesis.rows)
        if len(seeds) >= 2:
            values = np.stack([hypothesis.contrast(seed) for seed in seeds])
            tested[hypothesis.key] = (hypothesis, estimate(values))
    return tested
