"""A cell of the results table: the errors of each seed and utterance."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from s3prl_ekd.downstream.metrics.error_counts import ErrorCounts, count_errors
from s3prl_ekd.downstream.metrics.predictions import read_pairs
from s3prl_ekd.errors import DataError
from s3prl_ekd.superb.metrics import noise_digest, test_set
from s3prl_ekd.superb.results import FinishedRun


@dataclass(frozen=True)
class Metric:
    """One column of the table.

    Attributes:
        higher: higher is better (accuracies).
        characters: count the errors of an ASR run in characters.
    """

    task: str
    name: str
    higher: bool = False
    characters: bool = False

    @property
    def title(self) -> str:
        return f"{self.task.upper()} {self.name} {'↑' if self.higher else '↓'}"

    @property
    def key(self) -> str:
        return f"{self.task} {self.name}".lower()


METRICS = (
    Metric("pr", "PER"),
    Metric("asr", "WER"),
    Metric("asr", "CER", characters=True),
    Metric("sid", "accuracy", higher=True),
    Metric("er", "accuracy", higher=True),
)


@dataclass(frozen=True)
class Cell:
    """The errors behind one number: one row, one metric, one test condition.

    Attributes:
        folds: errors of each fold, ``[seed, utterance]``.
        noises: digest of the noises of the condition; None if it is not known.
    """

    row: str
    metric: Metric
    condition: str
    seeds: tuple[int, ...]
    folds: tuple[ErrorCounts, ...]
    noises: str | None = None

    @property
    def test_set(self) -> tuple:
        """Equal for two cells if they were tested on the same utterances."""
        return test_set(self.folds)


def make_cells(row: str, metric: Metric, seeds: dict[int, list[FinishedRun]]) -> Iterable[Cell]:
    """Make a cell for each test condition, from the seeds with all folds tested under it.

    Raises:
        DataError: the seeds were not tested on the same utterances, or not with the same noises.
    """
    conditions = {c for runs in seeds.values() for run in runs for c in run.tested}
    for condition in conditions:
        complete = {
            seed: sorted(runs, key=lambda run: run.fold or "")
            for seed, runs in sorted(seeds.items())
            if all(condition in run.tested for run in runs)
        }
        if not complete:
            continue
        per_seed = [[_count(run, metric, condition) for run in runs] for runs in complete.values()]
        folds = []
        for counts in zip(*per_seed, strict=True):
            first = counts[0]
            for other in counts[1:]:
                if test_set([other]) != test_set([first]):
                    raise DataError(
                        f"{row}, {metric.task} ({condition}): the seeds have different test "
                        "utterances; evaluate all seeds on one test set"
                    )
            errors = np.stack([c.errors for c in counts])
            folds.append(replace(first, errors=errors))
        noises = noise_digest(itertools.chain(*complete.values()), condition)
        yield Cell(row, metric, condition, tuple(complete), tuple(folds), noises)


def _count(run: FinishedRun, metric: Metric, condition: str) -> ErrorCounts:
    unit = "character" if metric.characters else "label" if metric.higher else "word"
    hypotheses, references = run.files(condition)
    return count_errors(read_pairs(hypotheses, references), unit)
