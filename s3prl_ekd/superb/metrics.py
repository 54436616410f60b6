"""Metrics of the tasks from s3prl's prediction files, with bootstrap intervals.

Percentile intervals (Efron 1979; for word error rates Bisani and Ney, ICASSP 2004): utterances are
drawn with replacement, the rate of the whole set is computed on each draw, and quantiles over the
draws bound the interval. Systems that are compared see the same draws. A task's metric is the mean
over seeds, for ER also over folds.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import editdistance
import numpy as np

from ..downstream.tasks import TASKS
from ..errors import DataError
from .results import Run, Selection

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


@dataclass(frozen=True)
class Counts:
    """Errors of each utterance, and what they are counted against.

    Attributes:
        names: ``[utterance]``, sorted.
        errors: ``[utterance]``; edit operations, or 1 for a wrong label.
        lengths: ``[utterance]``; reference tokens, or 1 for a label.
    """

    names: tuple[str, ...]
    errors: np.ndarray
    lengths: np.ndarray

    @property
    def rate(self) -> float:
        """Errors in per cent of the references of the whole set: WER, PER, or 100 - accuracy."""
        return 100 * float(self.errors.sum()) / float(self.lengths.sum())


def read_predictions(path: str | Path) -> dict[str, str]:
    """``utterance text`` lines -> text by utterance; an empty text is allowed.

    s3prl keeps only the stem of a file as the utterance's name. One that comes again is told apart
    by its place: ``u``, ``u (2)``; predictions and references have the same order.

    Raises:
        DataError: the file cannot be read, or has a line without a name.
    """
    try:
        # not splitlines(): it would also cut at separators that may stand within a text
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the predictions {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read the predictions {path}: they are not UTF-8 text") from None
    if lines[-1] == "":
        lines.pop()
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        name, _, text = line.partition(" ")
        if not name:
            raise DataError(f"{path}: line {number} has no utterance's name")
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = text.strip()
    return found


def read_pairs(hypotheses: Path, references: Path) -> list[tuple[str, str, str]]:
    """(utterance, hypothesis, reference) of every utterance, sorted by name.

    Raises:
        DataError: a file cannot be read, the two do not hold the same utterances, there are none,
            or a reference is empty.
    """
    hyp, ref = read_predictions(hypotheses), read_predictions(references)
    if not ref:
        raise DataError(f"{references} is empty; evaluate the run again")
    differing = sorted(hyp.keys() ^ ref.keys())
    if differing:
        raise DataError(
            f"{hypotheses} and {references.name} do not match: {differing[0]} is in only one of "
            "them; evaluate the run again"
        )
    for name, text in ref.items():
        if not text:
            raise DataError(
                f"{references}: the reference of {name} is empty, so it has no error rate; take it "
                "out of the test set"
            )
    return [(name, hyp[name], ref[name]) for name in sorted(ref)]


def count_errors(pairs: Sequence[tuple[str, str, str]], *, labels: bool) -> Counts:
    """Errors of each utterance of ``pairs`` (:func:`read_pairs`).

    Args:
        labels: whether a text is one label, right or wrong, or a sequence of tokens.
    """
    if labels:
        errors = [int(hyp != ref) for _, hyp, ref in pairs]
        lengths = [1] * len(pairs)
    else:
        errors = [editdistance.eval(hyp.split(), ref.split()) for _, hyp, ref in pairs]
        lengths = [len(ref.split()) for _, _, ref in pairs]
    names = tuple(name for name, _, _ in pairs)
    return Counts(names, np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64))


def count_characters(pairs: Sequence[tuple[str, str, str]]) -> Counts:
    """Edit operations on characters, spaces included, of each utterance of ``pairs``
    (:func:`read_pairs`): where hardly a word is right, they still tell systems apart."""
    errors = [editdistance.eval(hyp, ref) for _, hyp, ref in pairs]
    lengths = [len(ref) for _, _, ref in pairs]
    names = tuple(name for name, _, _ in pairs)
    return Counts(names, np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64))


def count_run(run: Run, condition: str) -> Counts:
    """Errors of a run's predictions of the test set under ``condition``.

    Raises:
        DataError: as in :func:`read_pairs`.
    """
    return count_errors(read_pairs(*run.files(condition)), labels=TASKS[run.task].metric == "acc")
