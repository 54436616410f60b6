"""Error rates and accuracies: the errors of each utterance over its reference's length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import editdistance
import numpy as np

from .predictions import reference_digest
from .sample import Sample


@dataclass(frozen=True, eq=False)
class ErrorCounts(Sample):
    """Errors and reference lengths of each utterance.

    Attributes:
        names: the utterances, sorted.
        errors: ``[utterance]``: edit operations, 1 for a wrong label, or a duration.
        lengths: ``[utterance]``: reference tokens, 1 for a label, or a duration.
        accuracy: the metric is 100 minus the error rate.
        texts: digest of the reference texts or turns; empty if it is not known.
    """

    names: tuple[str, ...]
    errors: np.ndarray
    lengths: np.ndarray
    accuracy: bool = False
    texts: bytes = b""

    @property
    def reference(self) -> bytes:
        return self.lengths.tobytes() + self.texts

    def values(self, weights: np.ndarray) -> np.ndarray:
        """See :meth:`Sample.values`; NaN for a resample of length 0."""
        with np.errstate(invalid="ignore"):
            rates = 100 * (weights @ self.errors) / (weights @ self.lengths)
        return 100 - rates if self.accuracy else rates


def count_errors(pairs: Sequence[tuple[str, str, str]], unit: str) -> ErrorCounts:
    """Count the errors of each utterance of ``pairs`` (:func:`read_pairs`).

    Args:
        unit: ``label``, a text is a single label, and the metric is the accuracy; ``word``, edits
            of words or phones; or ``character``, edits of characters and spaces. (Systems with a
            WER near 100 % still differ in CER.)
    """
    names = tuple(name for name, _, _ in pairs)
    if unit == "label":
        errors, lengths = [int(hyp != ref) for _, hyp, ref in pairs], [1] * len(pairs)
    else:
        split = str.split if unit == "word" else list
        errors = [editdistance.eval(split(hyp), split(ref)) for _, hyp, ref in pairs]
        lengths = [len(split(ref)) for _, _, ref in pairs]
    texts = reference_digest(pairs)
    accuracy = unit == "label"
    return ErrorCounts(names, np.array(errors), np.array(lengths), accuracy, texts)
