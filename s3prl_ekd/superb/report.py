"""Compute the contents of a report: metrics, SUPERB scores, differences."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..downstream.tasks import COLUMNS, DEFAULT_TASKS, TASKS
from ..errors import DataError
from .bootstrap import RESAMPLES, Estimate, interval, share_better
from .metrics import TaskMetric, compute_metrics
from .results import CLEAN, Cost, Results, SelectedRuns, incomplete, select_best_lr
from .score import superb_score

_NOISE = re.compile(r"(?P<noise>.+)_snr(?P<snr>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class Difference:
    """One upstream's metric or score minus another's on the same utterances.

    Attributes:
        low, high: the 95 % bootstrap interval of ``value``.
        better: fraction of resamples in which the first upstream is better; a tie counts as half.
    """

    value: float
    low: float
    high: float
    better: float


@dataclass(frozen=True, eq=False)
class Report:
    """The contents of a report. Tables and plots keep the order of each field's elements.

    Attributes:
        columns: metrics of the tasks, see :data:`..downstream.tasks.COLUMNS`.
        metrics: (upstream, column, condition) -> metric; no entry if not tested.
        scores: upstream -> SUPERB score on ``clean``; only upstreams with PR, SID, ER and ASR.
        scores_of_all: likewise over all tasks.
        notes: sentences about what is unfinished or not comparable.
    """

    upstreams: tuple[str, ...]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    conditions: tuple[str, ...]
    selections: Mapping[tuple[str, str], SelectedRuns]
    metrics: Mapping[tuple[str, str, str], TaskMetric]
    scores: Mapping[str, Estimate]
    scores_of_all: Mapping[str, Estimate]
    costs: Mapping[str, Cost]
    notes: tuple[str, ...]
    resamples: int

    def tested(self, condition: str) -> tuple[str, ...]:
        """The columns in which at least one upstream was tested under ``condition``."""
        tested = {column for _, column, c in self.metrics if c == condition}
        return tuple(column for column in self.columns if column in tested)

    def difference(
        self, upstream: str, baseline: str, column: str, condition: str
    ) -> Difference | None:
        """``upstream`` minus ``baseline``; None if a metric is missing or they are not comparable.

        See :meth:`.TaskMetric.is_comparable`.
        """
        a = self.metrics.get((upstream, column, condition))
        b = self.metrics.get((baseline, column, condition))
        if a is None or b is None or not a.is_comparable(b):
            return None
        return _difference(a, b, higher=COLUMNS[column].metric.higher_is_better)

    def score_difference(self, upstream: str, baseline: str) -> Difference | None:
        """Difference of the SUPERB scores; None unless their tasks are comparable."""
        if upstream not in self.scores or baseline not in self.scores:
            return None
        if any(self.difference(upstream, baseline, t, CLEAN) is None for t in DEFAULT_TASKS):
            return None
        return _difference(self.scores[upstream], self.scores[baseline], higher=True)


def _difference(a: Estimate, b: Estimate, *, higher: bool) -> Difference:
    draws = a.resampled - b.resampled
    low, high = interval(draws)
    return Difference(a.value - b.value, low, high, share_better(draws, higher=higher))


def make_report(results: Results, resamples: int = RESAMPLES) -> Report:
    """Choose learning rates by the dev metric, read the predictions, and compute test metrics.

    Raises:
        DataError: predictions are missing or damaged, or no run is complete.
    """
    selections = select_best_lr(results.runs, results.unfinished)
    notes = [f"Not complete: {line}." for line in incomplete(results.runs, results.unfinished)]
    if not selections:
        folders = ", ".join(map(str, results.unfinished[:3]))
        reason = notes[0] if notes else f"{len(results.unfinished)} unfinished: {folders}"
        raise DataError(f"no complete run to report ({reason}); run s3prl-ekd superb again")
    metrics = {}
    tasks = tuple(task for task in TASKS if any(key[1] == task for key in selections))
    conditions = sort_conditions(
        condition for s in selections.values() for run in s.runs for condition in run.tested
    )
    columns = tuple(name for task in tasks for name in TASKS[task].columns)
    cells = list(itertools.product(tasks, conditions))
    for task, condition in tqdm(cells, desc="bootstrap", leave=False, disable=None):
        group = [selection for key, selection in selections.items() if key[1] == task]
        for metric in compute_metrics(group, condition, resamples):
            metrics[metric.selection.upstream, metric.column, condition] = metric
    upstreams = tuple(u for u in results.upstreams if any(key[0] == u for key in selections))
    notes += _test_set_notes(cells, metrics)
    notes += _recipe_notes(tasks, selections)
    notes += _fold_notes(selections)
    notes += _selection_notes(tasks)
    notes += _padding_notes(selections)
    if results.unfinished:
        names = ", ".join("/".join(path.parts[-3:]) for path in results.unfinished)
        notes.append(f"Unfinished runs, not used: {len(results.unfinished)} ({names}).")
    return Report(
        upstreams=upstreams,
        tasks=tasks,
        columns=columns,
        conditions=conditions,
        selections=selections,
        metrics=metrics,
        scores=_scores(upstreams, metrics, DEFAULT_TASKS),
        scores_of_all=_scores(upstreams, metrics, tuple(TASKS)),
        costs=results.costs,
        notes=tuple(notes),
        resamples=resamples,
    )


def _scores(
    upstreams: Iterable[str],
    metrics: Mapping[tuple[str, str, str], TaskMetric],
    tasks: Sequence[str],
) -> dict[str, Estimate]:
    """The scores of the upstreams that have all ``tasks``."""
    scores = {}
    for upstream in upstreams:
        own = {
            column: m for (name, column, c), m in metrics.items() if (name, c) == (upstream, CLEAN)
        }
        value = superb_score({column: m.value for column, m in own.items()}, tasks)
        # The score is linear in each metric, and tasks on the same utterances share resamples.
        draws = superb_score({column: m.resampled for column, m in own.items()}, tasks)
        if value is not None and draws is not None:
            scores[upstream] = Estimate(value, draws)
    return scores


def _selection_notes(tasks: Sequence[str]) -> list[str]:
    """A note for each task whose checkpoint is chosen on the test set."""
    return [
        f"{name.upper()}: the checkpoint with the best {TASKS[name].main.name.upper()} on the test "
        "set, as in SUPERB, whose recipe has no dev set; so is the learning rate, of several."
        for name in tasks
        if TASKS[name].selection == "checkpoints"
    ]


def _padding_notes(selections: Mapping[tuple[str, str], SelectedRuns]) -> list[str]:
    """A note that lists the runs whose hidden states were computed without padding."""
    alone = [key for key, selection in selections.items() if selection.runs[0].features_alone]
    if not alone:
        return []
    text = "Hidden states of each utterance alone, without padding (--cache-features)"
    if len(alone) == len(selections):
        return [f"{text}."]
    names = ", ".join(f"{upstream}/{task}" for upstream, task in alone)
    return [
        f"{text}: {names}; of padded batches: all other runs. The two are comparable only for "
        "upstreams whose hidden states do not depend on padding: students with masked_norm, and "
        "models with layer norms in the conv extractor."
    ]


def _test_set_notes(
    cells: Iterable[tuple[str, str]],
    metrics: Mapping[tuple[str, str, str], TaskMetric],
) -> list[str]:
    """A note for each task and condition whose test set or noises differ between upstreams."""
    notes = []
    end = "so these results are not comparable."
    for task, condition in cells:  # the column of a task's main metric has its name
        by_name = {name: m for (name, *cell), m in metrics.items() if cell == [task, condition]}
        if len({m.test_set for m in by_name.values()}) > 1:
            sizes = ", ".join(f"{name} {m.units}" for name, m in by_name.items())
            notes.append(
                f"{task.upper()}, {condition}: test sets differ in {TASKS[task].unit} or labels "
                f"({sizes}), {end}"
            )
        if groups := _groups({name: m.noises for name, m in by_name.items()}):
            notes.append(f"{task.upper()}, {condition}: noises differ between {groups}, {end}")
    return notes


def _fold_notes(selections: Mapping[tuple[str, str], SelectedRuns]) -> list[str]:
    """A note for each upstream with a gap in its folds, if its records do not name the recipe's."""
    notes = []
    for (upstream, task), selection in selections.items():
        if any(run.folds for run in selection.runs):
            continue
        numbers = {int(fold.removeprefix("fold")) for fold in selection.folds if fold}
        missing = sorted(set(range(1, max(numbers, default=0))) - numbers)
        if missing:
            names = ", ".join(f"fold{number}" for number in missing)
            notes.append(f"{task.upper()}, {upstream}: no {names}; the mean is over the others.")
    return notes


def _recipe_notes(
    tasks: Iterable[str], selections: Mapping[tuple[str, str], SelectedRuns]
) -> list[str]:
    """A note for each task whose recipe or prepared corpus differs between upstreams."""
    notes = []
    for task in tasks:
        digests = {u: s.recipe_digest for (u, name), s in selections.items() if name == task}
        if groups := _groups(digests):
            notes.append(
                f"{task.upper()}: settings of the recipe (--override, an edited YAML) or the "
                f"prepared corpus differ between {groups}, so these results are not comparable."
            )
    return notes


def _groups(digests: Mapping[str, str | None]) -> str:
    """The upstreams by digest, ``a, c and b``; empty if there are no two different ones.

    An upstream without a digest (None) is left out.
    """
    by_digest: dict[str, list[str]] = {}
    for upstream, digest in digests.items():
        if digest is not None:
            by_digest.setdefault(digest, []).append(upstream)
    return " and ".join(map(", ".join, by_digest.values())) if len(by_digest) > 1 else ""


def split_condition(condition: str) -> tuple[str, float] | None:
    """Split ``babble_snr5`` into noise and SNR in dB; None for a condition of another form."""
    match = _NOISE.fullmatch(condition)
    return (match["noise"], float(match["snr"])) if match else None


def sort_conditions(conditions: Iterable[str]) -> tuple[str, ...]:
    """Sort conditions: clean, then by noise, each from the highest SNR to the lowest."""

    def key(condition: str) -> tuple:
        noise, snr = split_condition(condition) or (condition, 0.0)
        return condition != CLEAN, noise, -snr

    return tuple(sorted(set(conditions), key=key))


def condition_title(condition: str) -> str:
    """``babble_snr5`` -> ``babble, 5 dB SNR``."""
    parts = split_condition(condition)
    return f"{parts[0]}, {parts[1]:g} dB SNR" if parts else condition
