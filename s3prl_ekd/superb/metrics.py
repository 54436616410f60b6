"""Compute task metrics from s3prl's prediction files, with bootstrap intervals.

Percentile bootstrap (Efron 1979; for word error rates Bisani and Ney, ICASSP 2004): utterances are
resampled with replacement, the rate is computed on each resample, and quantiles of these rates are
the interval's bounds. Systems that are compared share the same resamples. A task's metric is the
mean over seeds, for ER also over folds.
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
from .results import FinishedRun, SelectedRuns

RESAMPLES = 10_000
_CELLS = 2_000_000  # size of a block [resample, utterance]: about 50 MB


def resampled_rates(
    errors: np.ndarray,
    lengths: np.ndarray,
    names: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Compute the error rate of each system on bootstrap resamples of the utterances.

    The resamples depend on ``names`` and ``seed`` alone. So results on the same utterances are
    paired (other systems, other tasks, the same speech under noise), and different test sets are
    resampled independently.

    Args:
        errors: ``[system, utterance]``.
        lengths: reference tokens, ``[utterance]``, each at least 1.
        names: ``[utterance]``.

    Returns:
        Error rates in per cent, ``[system, resample]``.
    """
    count = len(names)
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    columns = np.concatenate([errors, lengths[None]]).T.astype(np.float64)  # [utterance, system+1]
    sums = []
    for start in range(0, resamples, max(1, _CELLS // count)):
        rows = min(max(1, _CELLS // count), resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(weights.astype(np.float64) @ columns)  # [resample, system+1]
    total = np.concatenate(sums)
    return 100 * (total[:, :-1] / total[:, -1:]).T


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval with the central fraction ``level`` of ``values`` ``[resample]``."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_better(difference: np.ndarray, *, higher: bool) -> float:
    """The fraction of resamples in which the first system is better; a tie counts as half.

    Args:
        difference: first system's metric minus the second's, ``[resample]``.
        higher: whether a higher metric is better.
    """
    wins = difference > 0 if higher else difference < 0
    return float(wins.mean() + 0.5 * (difference == 0).mean())


@dataclass(frozen=True, eq=False)
class TaskMetric:
    """The metric of one upstream and task under one condition, in per cent.

    Attributes:
        value: the mean of ``by_seed``.
        by_seed: the metric of each seed.
        resampled: ``value`` on each resample of the utterances, ``[resample]``.
        utterances: size of the test set, all folds together.
        test_set: :func:`test_set` of its folds.
    """

    selection: SelectedRuns
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
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, eq=False)
class FoldErrors:
    """Errors of all seeds of an upstream on the test set of one fold.

    Attributes:
        names: ``[utterance]``.
        lengths: reference tokens, ``[utterance]``, as in :class:`ErrorCounts`.
        errors: ``[seed, utterance]``, as in :class:`ErrorCounts`.
    """

    names: tuple[str, ...]
    lengths: np.ndarray
    errors: np.ndarray


def test_set(folds: Sequence[FoldErrors]) -> tuple:
    """Key of the utterances and reference lengths; equal keys mean paired resamples."""
    return tuple((fold.names, fold.lengths.tobytes()) for fold in folds)


def compute_metrics(
    selections: Sequence[SelectedRuns], condition: str, resamples: int = RESAMPLES
) -> list[TaskMetric]:
    """Compute one task's metric for each upstream that was tested under ``condition``.

    A fold's rate is over all of its utterances (errors / reference tokens). ER is the mean of the
    folds' accuracies, as in SUPERB. Each fold is resampled separately.

    Raises:
        DataError: predictions are missing or damaged, or the seeds of one upstream were tested on
            different utterances.
    """
    tested = [s for s in selections if all(condition in run.tested for run in s.runs)]
    folds = [_fold_errors(selection, condition) for selection in tested]
    by_test_set: dict[tuple, list[int]] = {}  # test set -> indices into `tested`
    for i, group in enumerate(folds):
        by_test_set.setdefault(test_set(group), []).append(i)
    results: dict[int, TaskMetric] = {}
    for key, members in by_test_set.items():
        # All systems of one test set at once: drawing costs more than summing.
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
            results[i] = TaskMetric(
                selection=tested[i],
                condition=condition,
                value=float(seeds.mean()),
                by_seed=tuple(float(value) for value in seeds),
                resampled=draws,
                utterances=sum(len(fold.names) for fold in folds[i]),
                test_set=key,
            )
            start = end
    return [results[i] for i in range(len(tested))]


def _fold_errors(selection: SelectedRuns, condition: str) -> list[FoldErrors]:
    folds = []
    for name in selection.folds:
        runs = [run for run in selection.runs if run.fold == name]
        counts: list[ErrorCounts] = [count_run(run, condition) for run in runs]
        first = counts[0]
        for run, other in zip(runs[1:], counts[1:], strict=True):
            if other.names != first.names or (other.lengths != first.lengths).any():
                raise DataError(
                    f"{runs[0].folder} and {run.folder} were tested on different utterances "
                    f"({condition}); evaluate both on the same test set"
                )
        errors = np.stack([count.errors for count in counts])
        folds.append(FoldErrors(first.names, first.lengths, errors))
    return folds


@dataclass(frozen=True)
class ErrorCounts:
    """Errors and reference lengths of each utterance.

    Attributes:
        names: ``[utterance]``, sorted.
        errors: edit operations, or 1 for a wrong label, ``[utterance]``.
        lengths: reference tokens, or 1 for a label, ``[utterance]``.
    """

    names: tuple[str, ...]
    errors: np.ndarray
    lengths: np.ndarray

    @property
    def rate(self) -> float:
        """Error rate of the whole test set in per cent: WER, PER, or 100 - accuracy."""
        return 100 * float(self.errors.sum()) / float(self.lengths.sum())


def read_predictions(path: str | Path) -> dict[str, str]:
    """Read lines of ``UTTERANCE TEXT`` as {utterance: text}; the text may be empty.

    s3prl names an utterance by the stem of its file, so names may repeat. Repetitions are numbered
    in the order of the file: ``u``, ``u (2)``. Predictions and references have the same order.

    Raises:
        DataError: the file cannot be read, or a line has no utterance name.
    """
    try:
        # not splitlines(): it also splits at separators that may be part of a text
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read the predictions {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read the predictions {path}: not UTF-8 text") from None
    if lines[-1] == "":
        lines.pop()
    texts: dict[str, str] = {}
    occurrences: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        name, _, text = line.partition(" ")
        if not name:
            raise DataError(f"{path}: line {number}: no utterance name; expected UTTERANCE TEXT")
        occurrences[name] += 1
        count = occurrences[name]
        texts[name if count == 1 else f"{name} ({count})"] = text.strip()
    return texts


def read_pairs(hypotheses: Path, references: Path) -> list[tuple[str, str, str]]:
    """Read (utterance, hypothesis, reference) of all utterances, sorted by name.

    Raises:
        DataError: a file cannot be read, the files have different utterances or none, or a
            reference is empty.
    """
    hyp, ref = read_predictions(hypotheses), read_predictions(references)
    if not ref:
        raise DataError(f"{references} is empty; evaluate the run again")
    differing = sorted(hyp.keys() ^ ref.keys())
    if differing:
        raise DataError(
            f"{hypotheses} and {references.name} have different utterances: {differing[0]} is in "
            "only one of them; evaluate the run again"
        )
    for name, text in ref.items():
        if not text:
            raise DataError(
                f"{references}: the reference of {name} is empty, so its error rate is undefined; "
                "remove it from the test set"
            )
    return [(name, hyp[name], ref[name]) for name in sorted(ref)]


def count_errors(pairs: Sequence[tuple[str, str, str]], *, labels: bool) -> ErrorCounts:
    """Count the errors of each utterance of ``pairs`` (:func:`read_pairs`).

    Args:
        labels: whether a text is a single label instead of a sequence of tokens.
    """
    if labels:
        errors = [int(hyp != ref) for _, hyp, ref in pairs]
        lengths = [1] * len(pairs)
    else:
        errors = [editdistance.eval(hyp.split(), ref.split()) for _, hyp, ref in pairs]
        lengths = [len(ref.split()) for _, _, ref in pairs]
    names = tuple(name for name, _, _ in pairs)
    return ErrorCounts(names, np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64))


def count_characters(pairs: Sequence[tuple[str, str, str]]) -> ErrorCounts:
    """Count the character edits, spaces included, of each utterance of ``pairs``
    (:func:`read_pairs`). Systems with a WER near 100 % still differ in CER."""
    errors = [editdistance.eval(hyp, ref) for _, hyp, ref in pairs]
    lengths = [len(ref) for _, _, ref in pairs]
    names = tuple(name for name, _, _ in pairs)
    return ErrorCounts(names, np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64))


def count_run(run: FinishedRun, condition: str) -> ErrorCounts:
    """Count the errors of a run on the test set under ``condition``.

    Raises:
        DataError: as in :func:`read_pairs`.
    """
    return count_errors(read_pairs(*run.files(condition)), labels=TASKS[run.task].metric == "acc")
