"""Compute task metrics from s3prl's prediction files, with bootstrap intervals.

Percentile bootstrap (Efron 1979; for word error rates Bisani and Ney, ICASSP 2004): utterances are
resampled with replacement, the rate is computed on each resample, and quantiles of these rates are
the interval's bounds. Systems that are compared share the same resamples. A task's metric is the
mean over seeds, for ER also over folds. scipy's bootstrap would be as long, and ``report`` needs no
scipy.
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
from ..files.text import read_text
from .results import FinishedRun, SelectedRuns

RESAMPLES = 10_000
_CELLS = 2_000_000  # size of a block [resample, utterance]: about 50 MB
_MAX_PREDICTIONS = 1 << 30  # bytes


def resampled_rates(
    errors: np.ndarray, lengths: np.ndarray, names: Sequence[str], resamples: int = RESAMPLES
) -> np.ndarray:
    """Compute the error rate of each system on bootstrap resamples of the utterances.

    The resamples depend on ``names`` alone. So results on the same utterances are paired (other
    systems, other tasks, the same speech under noise), and different test sets are resampled
    independently.

    Args:
        errors: ``[system, utterance]``.
        lengths: reference tokens, ``[utterance]``, each at least 1.

    Returns:
        Error rates in per cent, ``[system, resample]``.
    """
    count = len(names)
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    rng = np.random.default_rng([0, int.from_bytes(digest[:8], "big")])
    columns = np.concatenate([errors, lengths[None]]).T.astype(np.float64)  # [utterance, system+1]
    block = max(1, _CELLS // count)
    sums = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums.append(weights.astype(np.float64) @ columns)  # [resample, system+1]
    total = np.concatenate(sums)
    return 100 * (total[:, :-1] / total[:, -1:]).T


def interval(values: np.ndarray) -> tuple[float, float]:
    """The interval with the central 95 % of ``values`` ``[resample]``."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def share_better(difference: np.ndarray, *, higher: bool) -> float:
    """The fraction of resamples in which the first system is better; a tie counts as half.

    ``difference`` is its metric minus the second's, ``[resample]``; ``higher``: higher is better.
    """
    wins = difference > 0 if higher else difference < 0
    return float(wins.mean() + 0.5 * (difference == 0).mean())


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric or score, and its values on the resamples of the utterances, ``[resample]``."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of ``value``."""
        return interval(self.resampled)


@dataclass(frozen=True, eq=False)
class TaskMetric(Estimate):
    """The metric of one upstream and task under one condition, in per cent."""

    selection: SelectedRuns
    by_seed: tuple[float, ...]  # ``value`` is their mean
    utterances: int  # of all folds together
    test_set: tuple  # see :func:`test_set`

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None


@dataclass(frozen=True, eq=False)
class ErrorCounts:
    """Errors and reference lengths of each utterance."""

    names: tuple[str, ...]  # sorted
    errors: np.ndarray  # [utterance] or [seed, utterance]: edit operations, or 1 for a wrong label
    lengths: np.ndarray  # [utterance]: reference tokens, or 1 for a label

    @property
    def rate(self) -> np.ndarray:
        """Error rate of the whole test set in per cent, ``[]`` or ``[seed]``."""
        return 100 * self.errors.sum(-1) / self.lengths.sum()


def test_set(folds: Sequence[ErrorCounts]) -> tuple:
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
    folds = [[_fold_errors(s, fold, condition) for fold in s.folds] for s in tested]
    test_sets = [test_set(group) for group in folds]
    metrics: dict[int, TaskMetric] = {}
    for key in dict.fromkeys(test_sets):
        # All systems of one test set at once: drawing costs more than summing.
        members = [i for i, other in enumerate(test_sets) if other == key]
        drawn, rates = [], []
        for stack in zip(*(folds[i] for i in members), strict=True):
            errors = np.concatenate([fold.errors for fold in stack])
            drawn.append(resampled_rates(errors, stack[0].lengths, stack[0].names, resamples))
            rates.append(np.concatenate([fold.rate for fold in stack]))
        ends = np.cumsum([len(folds[i][0].errors) for i in members])[:-1]
        draws_by_member = np.split(np.mean(drawn, axis=0), ends)
        rates_by_member = np.split(np.mean(rates, axis=0), ends)
        for i, draws, seeds in zip(members, draws_by_member, rates_by_member, strict=True):
            draws = draws.mean(axis=0)
            if TASKS[tested[i].task].higher_is_better:
                seeds, draws = 100 - seeds, 100 - draws
            metrics[i] = TaskMetric(
                value=float(seeds.mean()),
                resampled=draws,
                selection=tested[i],
                by_seed=tuple(seeds.tolist()),
                utterances=sum(len(fold.names) for fold in folds[i]),
                test_set=key,
            )
    return [metrics[i] for i in range(len(tested))]


def _fold_errors(selection: SelectedRuns, fold: str | None, condition: str) -> ErrorCounts:
    """The errors of all seeds on the test set of one fold, ``[seed, utterance]``."""
    runs = [run for run in selection.runs if run.fold == fold]
    counts = [count_run(run, condition) for run in runs]
    for run, other in zip(runs, counts, strict=True):
        if test_set([other]) != test_set(counts[:1]):
            raise DataError(
                f"{runs[0].folder} and {run.folder} were tested on different utterances "
                f"({condition}); evaluate both on the same test set"
            )
    errors = np.stack([count.errors for count in counts])
    return ErrorCounts(counts[0].names, errors, counts[0].lengths)


def read_predictions(path: str | Path, separator: str = " ") -> dict[str, str]:
    """Read lines of ``UTTERANCE TEXT`` as {utterance: text}; the text may be empty.

    s3prl names an utterance by the stem of its file, so names may repeat. Repetitions are numbered
    in the order of the file: ``u``, ``u (2)``. Predictions and references have the same order.
    """
    # not splitlines(): it also splits at separators that may be part of a text
    lines = read_text(path, "predictions", DataError, _MAX_PREDICTIONS).split("\n")
    if lines[-1] == "":
        lines.pop()
    texts: dict[str, str] = {}
    occurrences: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        name, _, text = line.partition(separator)
        if not name:
            raise DataError(
                f"{path}: line {number}: no utterance name; expected UTTERANCE{separator}TEXT"
            )
        occurrences[name] += 1
        count = occurrences[name]
        texts[name if count == 1 else f"{name} ({count})"] = text.strip()
    return texts


def read_pairs(
    hypotheses: Path, references: Path, separator: str = " "
) -> list[tuple[str, str, str]]:
    """Read (utterance, hypothesis, reference) of all utterances, sorted by name.

    Raises:
        DataError: a file cannot be read, the files have different utterances or none, or a
            reference is empty.
    """
    hyp, ref = (read_predictions(path, separator) for path in (hypotheses, references))
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


def count_errors(pairs: Sequence[tuple[str, str, str]], unit: str) -> ErrorCounts:
    """Count the errors of each utterance of ``pairs`` (:func:`read_pairs`).

    Args:
        unit: ``label``, a text is a single label; ``word``, edits of words or phones; or
            ``character``, edits of characters and spaces. (Systems with a WER near 100 % still
            differ in CER.)
    """
    names = tuple(name for name, _, _ in pairs)
    if unit == "label":
        errors, lengths = [int(hyp != ref) for _, hyp, ref in pairs], [1] * len(pairs)
    else:
        split = str.split if unit == "word" else list
        errors = [editdistance.eval(split(hyp), split(ref)) for _, hyp, ref in pairs]
        lengths = [len(split(ref)) for _, _, ref in pairs]
    return ErrorCounts(names, np.array(errors, dtype=np.int64), np.array(lengths, dtype=np.int64))


def count_run(run: FinishedRun, condition: str) -> ErrorCounts:
    """Count the errors of a run on the test set under ``condition``; see :func:`read_pairs`."""
    task = TASKS[run.task]
    pairs = read_pairs(*run.files(condition), task.separator)
    return count_errors(pairs, task.main.unit)
