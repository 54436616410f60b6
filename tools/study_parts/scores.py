"""What the runs have left: cells, dev scores, costs, of the students and for reference."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from s3prl_ekd.errors import DataError
from s3prl_ekd.superb.report import sort_conditions
from s3prl_ekd.superb.results import (
    RECORD,
    Cost,
    FinishedRun,
    Results,
    read_results,
    select_best_lr,
)

from .cells import METRICS, Cell, cells_of
from .design import Setting, rows, students
from .references import differing


@dataclass(frozen=True)
class Found:
    """Everything that is there.

    Attributes:
        cells: (row, metric's key, condition) -> cell.
        dev: (row, task) -> mean over the seeds of what s3prl chose the checkpoint by, per cent.
        costs: row -> cost, where it was measured.
        references: names of rows that are no students of this study.
        finished, wanted: downstream models, of the students.
        conditions: clean first.
        recipes: task -> (learning rate, steps) of the downstream runs.
        alone: tasks whose features were computed for each utterance alone.
        differing: ``name/task`` of references -> in what they were not run like the students.
    """

    cells: dict[tuple[str, str, str], Cell]
    dev: dict[tuple[str, str], float]
    costs: dict[str, Cost]
    references: tuple[str, ...]
    finished: int
    wanted: int
    conditions: tuple[str, ...]
    recipes: dict[str, tuple[float, int]]
    alone: tuple[str, ...]
    differing: dict[str, tuple[str, ...]]


def read_study(setting: Setting, superb: Path, references: Sequence[Path] = ()) -> Found:
    """Read the students' runs below ``superb``, and other results for reference.

    Raises:
        DataError: results are damaged, or the students were not all run alike.
    """
    results = Results((), (), {})
    if any(superb.glob(f"*/*/*/{RECORD}")):
        results = read_results([superb])
    grouped: dict[tuple[str, str], dict[int, list[FinishedRun]]] = {}
    known = {student.name: student for student in students(setting)}
    for run in results.runs:
        student = known.get(run.upstream)
        if student is not None and student.seed == run.seed and run.task in setting.tasks:
            per_seed = grouped.setdefault((student.row.name, run.task), {})
            per_seed.setdefault(run.seed, []).append(run)
    _check_alike(run for seeds in grouped.values() for runs in seeds.values() for run in runs)
    _drop_incomplete(grouped)
    finished = sum(len(seeds) for seeds in grouped.values())
    costs = {known[name].row.name: cost for name, cost in results.costs.items() if name in known}
    taken = {row.name for row in rows(setting)}
    names = []
    if references:
        others = read_results(list(references))
        for (name, task), selection in select_best_lr(others.runs, others.unfinished).items():
            if name in taken:
                raise DataError(f"--reference: a row is called {name} already")
            names.append(name)
            seeds = grouped.setdefault((name, task), {})
            for run in selection.runs:
                seeds.setdefault(run.seed, []).append(run)
        costs |= others.costs
    cells, dev = {}, {}
    for (row, task), seeds in grouped.items():
        if seeds:
            dev[row, task] = statistics.fmean(r.dev.value for runs in seeds.values() for r in runs)
        for metric in METRICS:
            if metric.task == task:
                for cell in cells_of(row, metric, seeds):
                    cells[row, metric.key, cell.condition] = cell
    of_students = [run for (row, _), seeds in grouped.items() if row in taken
                   for runs in seeds.values() for run in runs]  # fmt: skip
    return Found(
        cells,
        dev,
        costs,
        tuple(dict.fromkeys(names)),
        finished,
        len(known) * len(setting.tasks),
        sort_conditions(key[2] for key in cells),
        {run.task: (run.lr, run.steps) for run in of_students},
        tuple(
            t for t in setting.tasks if any(r.features_alone for r in of_students if r.task == t)
        ),
        differing(names, of_students, grouped, cells),
    )


def _check_alike(runs: Iterable[FinishedRun]) -> None:
    first: dict[str, FinishedRun] = {}
    for run in runs:
        other = first.setdefault(run.task, run)
        for what in ("lr", "steps", "recipe", "split", "features_alone"):
            if getattr(run, what) != getattr(other, what):
                raise DataError(
                    f"{other.folder} and {run.folder} differ in {what}, so the students were not "
                    "evaluated alike; move one away and run the study again"
                )


def _drop_incomplete(grouped: dict[tuple[str, str], dict[int, list[FinishedRun]]]) -> None:
    """A seed counts where it has every fold that any student has."""
    folds: dict[str, set] = {}
    for (_, task), seeds in grouped.items():
        for runs in seeds.values():
            folds.setdefault(task, set()).update(run.fold for run in runs)
    for (_, task), seeds in grouped.items():
        for seed in [s for s, runs in seeds.items() if {r.fold for r in runs} != folds[task]]:
            del seeds[seed]
