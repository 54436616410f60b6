"""Equal error rate of speaker verification, from s3prl's scores of the trials.

The ROC curve joins the rates at all thresholds by straight lines. The EER is where it crosses
``true positive rate = 1 - false positive rate``, as in ``downstream/sv_voxceleb1/utils.py`` of
s3prl, which uses scikit-learn and scipy.

Trials share recordings and speakers, so they are not drawn one by one: the units are the speakers
of the first recordings, each with all its trials.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import DataError
from .predictions import read_pairs, reference_digest
from .sample import Sample

_BLOCK = 256  # thresholds


@dataclass(frozen=True, eq=False)
class EqualErrorRate(Sample):
    """Scores and labels of trials.

    Attributes:
        names: the speakers of the first recordings, sorted.
        speakers: ``[trial]``: index in ``names``.
        same: ``[trial]``: whether both recordings are of one speaker.
        scores: ``[trial]``: higher for more similar voices.
        trials: digest of the trials' names and labels.
    """

    names: tuple[str, ...]
    speakers: np.ndarray
    same: np.ndarray
    scores: np.ndarray
    trials: bytes

    @property
    def reference(self) -> bytes:
        return self.trials

    def values(self, weights: np.ndarray) -> np.ndarray:
        """See :meth:`Sample.values`; NaN for a resample without trials of both kinds."""
        order = np.argsort(-self.scores, kind="stable")
        speakers, same = self.speakers[order], self.same[order]
        # numbers of accepted trials at the thresholds; equal scores are accepted together
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(self.scores[order])) + 1, [len(order)]])
        # search in two steps: the block of thresholds that has the crossing, and within the block
        ends = np.append(cuts[:-1:_BLOCK], cuts[-1])
        counts = (self._counts(speakers, same == kind, ends) for kind in (1, 0))
        accepted = np.stack([weights @ count.T for count in counts])
        totals = accepted[:, :, -1:]
        block = _first_beyond(accepted, totals)
        values = np.full(len(weights), np.nan)
        for number in np.unique(block[block > 0]):
            rows = block == number
            start, end = ends[number - 1], ends[number]
            within = cuts[(cuts >= start) & (cuts <= end)]
            counts = (self._counts(speakers, same == kind, within) for kind in (1, 0))
            before = accepted[:, rows, number - 1, None]
            points = before + np.stack([weights[rows] @ count.T for count in counts])
            values[rows] = _crossing(points, totals[:, rows])
        return 100 * values

    def _counts(self, speakers: np.ndarray, chosen: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Numbers of the chosen trials from ``ends[0]`` to each of ``ends``, ``[end, speaker]``."""
        edges = itertools.pairwise(ends)
        parts = [speakers[start:end][chosen[start:end]] for start, end in edges]
        rows = [np.bincount(part, minlength=len(self.names)) for part in parts]
        return np.cumsum([np.zeros(len(self.names)), *rows], axis=0)


def _above(accepted: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """How far each point ``[resample, threshold]`` is from the crossing: from 1 down to -1.

    Args:
        accepted: accepted trials of one speaker, and of two, ``[2, resample, threshold]``.
        totals: all trials, ``[2, resample, 1]``.
    """
    with np.errstate(invalid="ignore"):  # 0 / 0 in a resample without trials of a kind
        above: np.ndarray = 1 - (accepted / totals).sum(axis=0)
    return above


def _first_beyond(accepted: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The first threshold on or beyond the crossing, ``[resample]``; 0 if there is none."""
    return np.argmax(_above(accepted, totals) <= 0, axis=1)


def _crossing(accepted: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The false positive rate at the crossing, ``[resample]``."""
    above, rates = _above(accepted, totals), accepted[1] / totals[1]
    after = _first_beyond(accepted, totals)
    row = np.arange(len(after))
    left, right = above[row, after - 1], above[row, after]
    share = left / (left - right)
    crossing: np.ndarray = (1 - share) * rates[row, after - 1] + share * rates[row, after]
    return crossing


def read_scored_trials(predictions: Path, truth: Path) -> EqualErrorRate:
    """Read s3prl's ``test_predict.txt`` and our ``test_truth.txt``.

    A line is ``SPEAKER-VIDEO-UTTERANCE_SPEAKER-VIDEO-UTTERANCE SCORE``, or has the label 1 (same
    speaker) or 0.

    Raises:
        DataError: a file cannot be read, the files have different trials, a score is not a finite
            number, or there are no trials of one kind.
    """
    pairs = read_pairs(predictions, truth)
    labels = [label for _, _, label in pairs]
    for kind in ("1", "0"):
        if kind not in labels:
            raise DataError(f"{truth} has no trial with label {kind}; the EER needs 1 and 0")
    if wrong := set(labels) - {"0", "1"}:
        raise DataError(f"{truth}: a label must be 0 or 1, got {min(wrong)[:40]!r}")
    scores = _scores(predictions, [score for _, score, _ in pairs])
    first = [name.partition("-")[0] for name, _, _ in pairs]
    names, speakers = np.unique(first, return_inverse=True)
    same = np.array(labels) == "1"
    return EqualErrorRate(tuple(map(str, names)), speakers, same, scores, reference_digest(pairs))


def _scores(source: Path, texts: Sequence[str]) -> np.ndarray:
    try:
        scores = np.array([float(text) for text in texts])
    except ValueError as error:
        raise DataError(f"{source}: {error}; evaluate the run again") from None
    if not np.isfinite(scores).all():
        raise DataError(
            f"{source} has a score that is not finite: the training diverged; lower its learning "
            "rate"
        )
    return scores
