"""MTWV: how well spoken queries are detected in documents, at the best threshold for all of them.

At a threshold θ, a query is detected in the documents whose score is θ or more::

    TWV(θ) = mean over queries of 1 - P_miss - BETA * P_fa
    P_miss = missed documents / documents with the query
    P_fa   = falsely detected documents / documents without the query

MTWV is the maximum of TWV(θ), as in MediaEval's QUESST 2014: without detections TWV is 0. Queries
are those of the ground truth that are in a document, in all of its languages. Pairs without a score
are not detected, and s3prl scores only English queries and documents. So the others count as missed
and their documents among those without the query, as in the official scorer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

import numpy as np

from ...errors import DataError
from ...files.atomic import write_text
from ...files.text import check_regular, read_text
from .sample import Sample

# NIST's (C_fa / C_miss) (1 / P_target - 1), with QUESST's costs 1 and 100 and prior 0.0008
BETA = 1 / 100 * (1 / 0.0008 - 1)
_MAX_FILE = 1 << 30  # bytes; QUESST's English scores are 35 MB
_BLOCK = 256  # thresholds


@dataclass(frozen=True)
class Reference:
    """The ground truth of a split.

    Attributes:
        documents: how many there are.
        truth: query -> the documents that contain it, at least one; sorted.
    """

    documents: int
    truth: Mapping[str, frozenset[str]]

    def __str__(self) -> str:
        """The contents of a reference file: ``documents N``, and lines ``QUERY DOCUMENT ...``."""
        lines = [f"documents {self.documents}"]
        lines += [" ".join([query, *sorted(names)]) for query, names in self.truth.items()]
        return "".join(f"{line}\n" for line in lines)


def write_reference(reference: Reference, path: Path) -> None:
    """Write a reference file."""
    write_text(path, str(reference))


def read_reference(path: Path) -> Reference:
    """Read a reference file. Raises DataError if it is damaged."""
    head, *lines = read_text(path, "reference", DataError, _MAX_FILE).splitlines() or [""]
    count = head.removeprefix("documents ")
    truth = {query: frozenset(names) for query, *names in map(str.split, filter(None, lines))}
    names = frozenset().union(*truth.values())
    valid = count.isdecimal() and truth and all(truth.values()) and len(truth) == len(lines)
    if not valid or len(names) > int(count):
        raise DataError(f"{path} is damaged; evaluate the run again")
    return Reference(int(count), truth)


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """Read the scores in s3prl's ``benchmark.stdlist.xml`` (NIST's format of detections).

    Returns:
        query -> document -> score.

    Raises:
        DataError: the file is damaged, or has a DTD, which could define entities of any size.
    """
    check_regular(path, "scores", DataError, _MAX_FILE)
    scores: dict[str, dict[str, float]] = {}
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise DataError(f"{path} has a DTD; evaluate the run again")

    def start(tag: str, values: dict[str, str]) -> None:
        where = f"{path}: line {parser.CurrentLineNumber}"
        try:
            if tag == "detected_termlist":
                if values["termid"] in scores:
                    raise DataError(f"{where}: the query {values['termid']} is there twice")
                scores[values["termid"]] = {}
            elif tag == "term":
                own = scores[next(reversed(scores))]
                score = float(values["score"])
                if not math.isfinite(score):
                    raise DataError(
                        f"{where}: the score is {values['score']}: the upstream's hidden states "
                        "are not finite; choose another upstream or layer"
                    )
                if values["file"] in own:
                    raise DataError(f"{where}: the document {values['file']} is there twice")
                own[values["file"]] = score
        except (KeyError, ValueError, StopIteration):
            raise DataError(f"{where} is damaged; evaluate the run again") from None

    parser.StartDoctypeDeclHandler, parser.StartElementHandler = refuse, start
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the latter: its encoding
        raise DataError(f"{path} is damaged ({error}); evaluate the run again") from None
    return scores


@dataclass(frozen=True, eq=False)
class TermWeightedValues(Sample):
    """The values of the scored queries at every threshold that matters.

    Attributes:
        names: queries that have scores and are in a document.
        curves: ``[query, threshold]``: 1 - P_miss - BETA P_fa. The maximum over all thresholds is
            at the score of a true document or above all scores: between them only false
            detections are added.
        share: of the queries of the ground truth that have scores. It stays the same in a resample.
        truth: what the scores were compared with.
    """

    names: tuple[str, ...]
    curves: np.ndarray
    share: float
    truth: Reference

    @property
    def reference(self) -> bytes:
        return str(self.truth).encode()

    def values(self, weights: np.ndarray) -> np.ndarray:
        best = np.zeros(len(weights))
        for start in range(0, self.curves.shape[1], _BLOCK):
            sums = weights @ self.curves[:, start : start + _BLOCK]
            np.maximum(best, sums.max(axis=1), out=best)
        return 100 * self.share * best / weights.sum(axis=1)


def measure_detections(
    scores: Mapping[str, Mapping[str, float]], reference: Reference
) -> TermWeightedValues:
    """Compare scores with the ground truth.

    Raises:
        DataError: no query has both.
    """
    truth = reference.truth
    names = tuple(sorted(scores.keys() & truth.keys()))
    hits = [[scores[name][d] for d in truth[name] & scores[name].keys()] for name in names]
    false = [[s for d, s in scores[name].items() if d not in truth[name]] for name in names]
    if not any(hits):
        raise DataError(
            "no query has a score for a document that contains it: the scores and the ground truth "
            "are of different corpora; evaluate the run again"
        )
    thresholds = np.unique(np.concatenate(hits))
    curves = np.empty((len(names), len(thresholds)))
    for row, name in enumerate(names):
        detected = _count_from(hits[row], thresholds) / len(truth[name])
        # without any other document there are no false detections
        others = max(1, reference.documents - len(truth[name]))
        curves[row] = detected - BETA * _count_from(false[row], thresholds) / others
    return TermWeightedValues(names, curves, len(names) / len(truth), reference)


def _count_from(scores: list[float], thresholds: np.ndarray) -> np.ndarray:
    """How many scores are at each threshold or above it, ``[threshold]``."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
