"""Everything that a report on downstream runs says, as values: metrics, scores, differences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..downstream.tasks import TASKS
from ..errors import DataError
from .metrics import RESAMPLES, Measure, interval, measure, share_better
from .results import Cost, Results, Selection, incomplete, select
from .score import superb_score

CLEAN = "clean"
_NOISE = re.compile(r"(?P<noise>.+)_snr(?P<snr>-?\d+(\.\d+)?)")


@dataclass(frozen=True, eq=False)
class Score:
    """The SUPERB score of an upstream, and on each resample ``[resample]``."""

    value: float
    resampled: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.resampled)


@dataclass(frozen=True)
class Difference:
    """One upstream less another on the same utterances, in the metric's unit.

    Attributes:
        better: share of the resamples in which it is the better one, ties by half.
    """

    value: float
    low: float
    high: float
    better: float


@dataclass(frozen=True, eq=False)
class Report:
    """What there is to tell. All orders are the order of rows, columns and bars.

    Attributes:
        measures: (upstream, task, condition) -> metric; what was not tested has no entry.
        scores: upstream -> SUPERB score on ``clean``, for those that have all four tasks.
        notes: a sentence each about what is missing or was left out.
    """

    upstreams: tuple[str, ...]
    tasks: tuple[str, ...]
    conditions: tuple[str, ...]
    selections: Mapping[tuple[str, str], Selection]
    measures: Mapping[tuple[str, str, str], Measure]
    scores: Mapping[str, Score]
    costs: Mapping[str, Cost]
    unfinished: tuple[Path, ...]
    notes: tuple[str, ...]
    resamples: int

    def tested(self, condition: str) -> tuple[str, ...]:
        """The tasks that any upstream was tested in under ``condition``."""
        found = {task for _, task, c in self.measures if c == condition}
        return tuple(task for task in self.tasks if task in found)

    def difference(self, one: str, other: str, task: str, condition: str) -> Difference | None:
        """``one`` less ``other``; None where a metric is missing or the test sets differ."""
        a = self.measures.get((one, task, condition))
        b = self.measures.get((other, task, condition))
        if a is None or b is None or a.test_set != b.test_set:
            return None
        return _difference(a, b, higher=TASKS[task].higher_is_better)

    def score_difference(self, one: str, other: str) -> Difference | None:
        """The same of the SUPERB score: paired only if every task is."""
        if one not in self.scores or other not in self.scores:
            return None
        if any(self.difference(one, other, task, CLEAN) is None for task in self.tasks):
            return None
        return _difference(self.scores[one], self.scores[other], higher=True)


def _difference(a: Measure | Score, b: Measure | Score, *, higher: bool) -> Difference:
    draws = a.resampled - b.resampled
    low, high = interval(draws)
    return Difference(a.value - b.value, low, high, share_better(draws, higher=higher))


def make_report(results: Results, resamples: int = RESAMPLES) -> Report:
    """Choose by dev, read the predictions of what is chosen, and measure.

    Raises:
        DataError: predictions are missing or damaged, or no run can be used.
    """
    selections = select(results.runs, results.unfinished)
    notes = [f"Not complete: {line}." for line in incomplete(results.runs, results.unfinished)]
    if not selections:
        count = len(results.unfinished)
        why = (
            notes[0]
            if notes
            else f"{count} unfinished: " + ", ".join(str(path) for path in results.unfinished[:3])
        )
        raise DataError(f"there is nothing to report yet ({why}); start s3prl-ekd superb again")
    measures = {}
    tasks = tuple(task for task in TASKS if any(key[1] == task for key in selections))
    conditions = sort_conditions(
        condition for s in selections.values() for run in s.runs for condition in run.tested
    )
    cells = list(itertools.product(tasks, conditions))
    for task, condition in tqdm(cells, desc="bootstrap", leave=False, disable=None):
        group = [selection for key, selection in selections.items() if key[1] == task]
        for found in measure(group, condition, resamples):
            measures[found.selection.upstream, task, condition] = found
    upstreams = tuple(u for u in results.upstreams if any(key[0] == u for key in selections))
    notes += _differing(tasks, conditions, measures)
    notes += _alone(selections)
    return Report(
        upstreams=upstreams,
        tasks=tasks,
        conditions=conditions,
        selections=selections,
        measures=measures,
        scores=_scores(upstreams, tasks, measures),
        costs=results.costs,
        unfinished=results.unfinished,
        notes=tuple(notes),
        resamples=resamples,
    )


def _scores(
    upstreams: Sequence[str],
    tasks: Sequence[str],
    measures: Mapping[tuple[str, str, str], Measure],
) -> dict[str, Score]:
    scores = {}
    for name in upstreams:
        found = {t: measures[name, t, CLEAN] for t in tasks if (name, t, CLEAN) in measures}
        value = superb_score({task: m.value for task, m in found.items()})
        # Linear in each metric, and draws of the same speech are the same in every task.
        draws = superb_score({task: m.resampled for task, m in found.items()})
        if value is not None and draws is not None:
            scores[name] = Score(value, draws)
    return scores


def _alone(selections: Mapping[tuple[str, str], Selection]) -> list[str]:
    """Which hidden states are of each utterance alone: a sentence, or none where none are."""
    alone = [key for key, chosen in selections.items() if chosen.runs[0].features_alone]
    if not alone:
        return []
    text = "Features of each utterance alone (--cache-features)"
    if len(alone) == len(selections):
        return [f"{text}."]
    names = ", ".join(f"{upstream}/{task}" for upstream, task in alone)
    return [
        f"{text} for {names}, of padded batches for the others; the two differ a little, so do "
        "not compare them closely."
    ]


def _differing(
    tasks: Sequence[str],
    conditions: Sequence[str],
    measures: Mapping[tuple[str, str, str], Measure],
) -> list[str]:
    """A note for each test set that is not the same for all upstreams."""
    notes = []
    for task in tasks:
        for condition in conditions:
            found = {name: m for (name, t, c), m in measures.items() if (t, c) == (task, condition)}
            if len({m.test_set for m in found.values()}) > 1:
                sizes = ", ".join(f"{name} {m.utterances}" for name, m in found.items())
                notes.append(
                    f"{task.upper()}, {condition}: not tested on the same utterances "
                    f"(numbers of them: {sizes}), so these are not comparable."
                )
    return notes


def split_condition(condition: str) -> tuple[str, float] | None:
    """Noise and SNR in dB of a condition such as ``babble_snr5``; None for any other."""
    match = _NOISE.fullmatch(condition)
    return (match["noise"], float(match["snr"])) if match else None


def sort_conditions(conditions: Iterable[str]) -> tuple[str, ...]:
    """Clean first, then noise by noise from the highest SNR to the lowest."""

    def place(condition: str) -> tuple:
        noise, snr = split_condition(condition) or (condition, 0.0)
        return condition != CLEAN, noise, -snr

    return tuple(sorted(set(conditions), key=place))


def condition_title(condition: str) -> str:
    """``babble_snr5`` -> ``babble, 5 dB SNR``."""
    parts = split_condition(condition)
    return f"{parts[0]}, {parts[1]:g} dB SNR" if parts else condition
