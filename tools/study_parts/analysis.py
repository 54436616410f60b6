"""From results to hypotheses: normalised scores, paired contrasts, intervals, multiplicity.

The normalised score of a student, teacher or set is its share of the way from the untrained
student (0) to the best probe of a teacher without labels (1), averaged over phone frames, clean,
and speakers under noise. A contrast is computed within each seed (rows of a seed share first
weights, data and distortion), so its spread over seeds is that of the difference. Its variance also
has a part for other speakers, from a bootstrap of the test speakers. Intervals are Student's t with
Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from s3prl_ekd.errors import SetupError
from s3prl_ekd.probe.measure import CLEAN

from .results import NOISY, StudyResult
from .rows import (
    AVERAGE_HEADS,
    BASES,
    EXPERTS,
    MIXED,
    PLAIN,
    SCALE,
    SETS,
    START,
    STARTED,
    TERMS,
    Row,
    set_name,
)

PRIMARY = (("phone frames", CLEAN), ("speaker", NOISY))
# Of teachers' knowledge: clean, as the targets of the students are those of clean speech
KNOWLEDGE = (("phone frames", CLEAN), ("speaker", CLEAN))
RESAMPLES = 1000
EQUIVALENCE = 0.1  # of the way from the untrained student to the best teacher
LEAST_SPAN = 2.0  # points of that way; with less, a share of it means nothing
LEAST_SEEDS = 4  # for a verdict: with two, intervals miss the true value in 10 % of the cases
CORRECTED = ("H1", "H1b", "H2", "H3", "H4", "H5")
DEV_SHARE = 5  # one speaker in five chooses the best single teacher, and is not tested


@dataclass(frozen=True)
class ContrastEstimate:
    """A contrast of normalised scores.

    Attributes:
        value: mean over the seeds; ``by_seed`` has each.
        low, high: 95 % interval.
        p: two-sided, of the value 0.
        p_equivalent: of a true value outside ±:data:`EQUIVALENCE` (two one-sided tests).
        deviation: standard deviation over seeds.
        detectable: smallest true value that is found in 80 % of such studies, two-sided, at 5 %
            and at the first step of Holm's correction.
    """

    value: float
    low: float
    high: float
    p: float
    p_equivalent: float
    by_seed: tuple[float, ...]
    deviation: float
    detectable: tuple[float, float]


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
        return np.mean(self._shares(self.students[row, seed], scores), axis=0)

    def worst(self, row: str, seed: int) -> np.ndarray:
        """The smaller of a student's two shares of the way, ``[1 + resample]``: a student of
        several teachers should be bad at nothing."""
        return np.min(self._shares(self.students[row, seed], PRIMARY), axis=0)

    def _shares(self, result: StudyResult, scores: Sequence[tuple[str, str]]) -> list[np.ndarray]:
        parts = []
        for score in scores:
            low, high = self.span(score)
            parts.append((self.accuracy(result, score) - low) / (high - low))
        return parts

    def span(self, score: tuple[str, str]) -> tuple[float, float]:
        """Mean accuracy of the untrained students, and of the best probe of a teacher that was
        trained without labels.

        Raises:
            SetupError: a result is missing, or the teachers are not better.
        """
        untrained = [r for (row, _), r in self.students.items() if row == "none"]
        names = [name for name in SCALE if name in self.teachers]
        if not untrained or not names:
            raise SetupError(
                "scores need results of row none and of the teachers: run with --rows none first"
            )
        low = float(np.mean([self.accuracy(r, score)[0] for r in untrained]))
        high = max(float(self.accuracy(self.teachers[name], score)[0]) for name in names)
        if high - low < LEAST_SPAN:
            raise SetupError(
                f"{', '.join(score)}: the best teacher ({high:.1f} %) is not {LEAST_SPAN:g} points "
                f"better than untrained students ({low:.1f} %), so students cannot be scored"
            )
        return low, high

    def best_single(self, teachers: tuple[str, ...]) -> str:
        """The teacher whose students have the best normalised score on the dev speakers, over the
        seeds that all of these teachers have."""
        seeds = self.seeds(teachers) or self.seeds([])

        def dev_score(row: str) -> float:
            values = []
            for seed in (s for s in seeds if (row, s) in self.students):
                for score in PRIMARY:
                    low, high = self.span(score)
                    counts = self.students[row, seed].scores[score]
                    table = np.array([counts[s] for s in counts if s in self.dev])
                    errors, examples = table.sum(0)
                    values.append((100 - 100 * errors / examples - low) / (high - low))
            return float(np.mean(values)) if values else -math.inf

        return max(teachers, key=dev_score)

    def headroom(self, teachers: tuple[str, ...]) -> np.ndarray | None:
        """Score of the probe of all teachers, less that of the best single one, on clean speech.

        Returns:
            ``[1 + resample]``; None if a probe is missing.
        """
        names = (set_name(teachers), *teachers)
        if any(name not in self.teachers for name in names):
            return None
        together, *members = (
            np.mean(self._shares(self.teachers[n], KNOWLEDGE), axis=0) for n in names
        )
        best = max(members, key=lambda values: float(values[0]))
        return together - best


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
    level = student_t.ppf(0.8, freedom)
    return ContrastEstimate(
        value,
        value - margin,
        value + margin,
        float(2 * student_t.sf(abs(value) / error, freedom)),
        float(student_t.sf((EQUIVALENCE - abs(value)) / error, freedom)),
        tuple(float(v) for v in by_seed),
        float(by_seed.std(ddof=1)),
        (
            float((student_t.ppf(0.975, freedom) + level) * error),
            float((student_t.ppf(1 - 0.025 / len(CORRECTED), freedom) + level) * error),
        ),
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

    def row(teachers: tuple[str, ...], combination: str) -> str:
        return Row(teachers, combination).name

    def mean(*names: str, only: Sequence[tuple[str, str]] = PRIMARY):
        return lambda seed: np.mean([scores.normalised(n, seed, only) for n in names], axis=0)

    def difference(first, second) -> Callable[[int], np.ndarray]:
        return lambda seed: first(seed) - second(seed)

    best = {teachers: scores.best_single(teachers) for teachers in SETS}
    heads = row(EXPERTS, "separate")
    average, concat = (
        tuple(row(teachers, combination) for teachers in (EXPERTS, PLAIN))
        for combination in ("average", "concat")
    )
    both = row(EXPERTS, AVERAGE_HEADS)
    doses = {s: scores.headroom(s) for s in SETS if scores.headroom(s) is not None}

    def slope(sets: Sequence[tuple[str, ...]]) -> Callable[[int], np.ndarray]:
        def by_seed(seed: int) -> np.ndarray:
            gains = np.stack(
                [
                    scores.normalised(row(teachers, "separate"), seed)
                    - scores.normalised(best[teachers], seed)
                    for teachers in sets
                ]
            )
            dose = np.stack([doses[teachers] for teachers in sets])
            centred = dose - dose.mean(0)
            return (centred * gains).sum(0) / np.square(centred).sum(0)

        return by_seed

    def slope_rows(sets: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(r for s in sets for r in (row(s, "separate"), best[s]))

    clean = [(score, CLEAN) for score, _ in PRIMARY]
    noisy = [(score, NOISY) for score, _ in PRIMARY]
    plain = row(PLAIN, "separate")
    common = [row(EXPERTS, f"average, {basis}") for basis in BASES]
    return [
        Hypothesis(
            "H1",
            f"heads for {set_name(EXPERTS)} - {best[EXPERTS]} alone",
            (heads, best[EXPERTS]),
            difference(mean(heads), mean(best[EXPERTS])),
        ),
        *(
            [
                Hypothesis(
                    "H1b",
                    "gain of heads over the best single teacher, per headroom",
                    slope_rows(list(doses)),
                    slope(list(doses)),
                )
            ]
            if len(doses) > 2 and len({float(dose[0]) for dose in doses.values()}) > 1
            else []
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
            "H3'",
            "heads - average",
            (heads, average[0]),
            difference(mean(heads), mean(average[0])),
        ),
        Hypothesis(
            "H4",
            f"{set_name(PLAIN)} - hubert: under noise less clean",
            (plain, "hubert"),
            difference(
                difference(mean(plain, only=noisy), mean("hubert", only=noisy)),
                difference(mean(plain, only=clean), mean("hubert", only=clean)),
            ),
        ),
        Hypothesis(
            "H5",
            "average after PHI-S or Procrustes (mean of both) - average",
            (*common, average[0]),
            difference(mean(*common), mean(average[0])),
        ),
        Hypothesis(  # added after the first two seeds
            "H1, clean",
            f"heads for {set_name(EXPERTS)} - {best[EXPERTS]} alone, both tasks on clean speech",
            (heads, best[EXPERTS]),
            difference(mean(heads, only=KNOWLEDGE), mean(best[EXPERTS], only=KNOWLEDGE)),
        ),
        Hypothesis(
            "worst",
            f"the worse of the two tasks: heads for {set_name(EXPERTS)} - {best[EXPERTS]} alone",
            (heads, best[EXPERTS]),
            lambda seed: scores.worst(heads, seed) - scores.worst(best[EXPERTS], seed),
        ),
        *(
            Hypothesis(
                f"H1, {set_name(teachers)}",
                f"heads for {set_name(teachers)} - {best[teachers]} alone",
                (row(teachers, "separate"), best[teachers]),
                difference(mean(row(teachers, "separate")), mean(best[teachers])),
            )
            for teachers in (PLAIN, MIXED)
        ),
        *(
            Hypothesis(
                term,
                f"heads for {set_name(PLAIN)} and the {term.removesuffix('s')} loss - heads",
                (row(PLAIN, f"separate, {term}"), plain),
                difference(mean(row(PLAIN, f"separate, {term}")), mean(plain)),
            )
            for term in TERMS
        ),
        Hypothesis(
            "distillation",
            "hubert - no training",
            ("hubert", "none"),
            difference(mean("hubert"), mean("none")),
        ),
        *(  # the other members: few dev speakers choose the best one
            Hypothesis(
                f"{set_name(teachers)}, {name}",
                f"heads for {set_name(teachers)} - {name} alone",
                (row(teachers, "separate"), name),
                difference(mean(row(teachers, "separate")), mean(name)),
            )
            for teachers in SETS
            for name in teachers
            if name != best[teachers]
        ),
        *(
            Hypothesis(
                other,
                f"heads for {set_name(PLAIN)} - {other}",
                (started, other),
                difference(mean(started), mean(other)),
            )
            for *others, started in [[Row(teachers, start=START).name for teachers in STARTED]]
            for other in others
        ),
    ]


def estimate_hypotheses(scores: Scores) -> dict[str, tuple[Hypothesis, ContrastEstimate]]:
    """Estimate each hypothesis for which two seeds or more have all rows."""
    tested = {}
    for hypothesis in hypotheses(scores):
        seeds = scores.seeds(hypothesis.rows)
        if len(seeds) >= 2:
            values = np.stack([hypothesis.contrast(seed) for seed in seeds])
            tested[hypothesis.key] = (hypothesis, estimate(values))
    return tested
