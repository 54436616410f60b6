"""Errors and reference lengths of each utterance, from s3prl's prediction files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import editdistance
import numpy as np

from ..downstream.tasks import TASKS
from ..errors import DataError
from .records import Run


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
