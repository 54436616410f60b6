"""Read s3prl's prediction files: a line ``UTTERANCE TEXT`` for each utterance."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ...files.text import read_text

_MAX_PREDICTIONS = 1 << 30  # bytes


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


def reference_digest(pairs: Sequence[tuple[str, str, str]]) -> bytes:
    """SHA-256 of the utterances and their references in ``pairs`` (:func:`read_pairs`)."""
    lines = "\n".join(f"{name} {reference}" for name, _, reference in pairs)
    return hashlib.sha256(lines.encode()).digest()
