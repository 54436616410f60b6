"""Read the results of the students and of the references: cells, dev scores, costs."""

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

from .cells import METRICS, Cell, make_cells
from .design import StudySetting, rows, students
from .references import reference_differences


@dataclass(frozen=True)
class StudyResults:
    """All results of the study.

    Attributes:
        cells: (row, metric's key, condition) -> cell.
        dev: (row, task) -> mean over the seeds of the dev metric that s3prl chose the checkpoint
            by, per cent.
        costs: row -> cost, if measured.
        references: names of rows that are not students of this study.
        finished, planned: number of downstream models of the students.
        conditions: clean first.
        recipes: task -> (learning rate, steps) of the downstream runs.
        features_alone: tasks whose features were computed for each utterance alone.
        reference_differences: ``name/task`` of references -> settings that differ from the
            students'.
    """

    cells: dict[tuple[str, str, str], Cell]
    dev: dict[tuple[str, str], float]
    costs: dict[str, Cost]
    references: tuple[str, ...]
    finished: int
    planned: int
    conditions: tuple[str, ...]
    recipes: dict[str, tuple[float, int]]
    features_alone: tuple[str, ...]
    reference_differences: dict[str, tuple[str, ...]]


def read_study(
    setting: StudySetting, superb: Path, references: Sequence[Path] = ()
) -> StudyResults:
    """Read the students' runs below ``superb``, and the runs of the references.

    Raises:
        DataError: results are damaged, or the students were run with different settings.
    """
    results = Results((), (), {})
    if any(superb.glob(f"*/*/*/{RECORD}")):
        results = read_results([superb])
    grouped: dict[tuple[str, str], dict[int, list[FinishedRun]]] = {}
    by_name = {student.name: student for student in students(setting)}
    for run in results.runs:
        student = by_name.get(run.upstream)
        if student is not None and student.seed == run.seed and run.task in setting.tasks:
            per_seed = grouped.setdefault((student.row.name, run.task), {})
            per_seed.setdefault(run.seed, []).append(run)
    _check_alike(run for seeds in grouped.values() for runs in seeds.values() for run in runs)
    _drop_incomplete(grouped)
    finished = sum(len(seeds) for seeds in grouped.values())
    costs = {
        by_name[name].row.name: cost for name, cost in results.costs.items() if name in by_name
    }
    row_names = {row.name for row in rows(setting)}
    names = []
    if references:
        of_references = read_results(list(references))
        best_runs = select_best_lr(of_references.runs, of_references.unfinished)
        for (name, task), selection in best_runs.items():
            if name in row_names:
                raise DataError(f"--reference: {name} is already the name of a row of students")
            names.append(name)
            seeds = grouped.setdefault((name, task), {})
            for run in selection.runs:
                seeds.setdefault(run.seed, []).append(run)
        costs |= of_references.costs
    cells, dev = {}, {}
    for (row, task), seeds in grouped.items():
        if seeds:
            dev[row, task] = statistics.fmean(r.dev.value for runs in seeds.values() for r in runs)
        for metric in METRICS:
            if metric.task == task:
                for cell in make_cells(row, metric, seeds):
                    cells[row, metric.key, cell.condition] = cell
    student_runs = [run for (row, _), seeds in grouped.items() if row in row_names
                   for runs in seeds.values() for run in runs]  # fmt: skip
    return StudyResults(
        cells,
        dev,
        costs,
        tuple(dict.fromkeys(names)),
        finished,
        len(by_name) * len(setting.tasks),
        sort_conditions(key[2] for key in cells),
        {run.task: (run.lr, run.steps) for run in student_runs},
        tuple(
            t for t in setting.tasks if any(r.features_alone for r in student_runs if r.task == t)
        ),
        reference_differences(names, student_runs, grouped, cells),
    )


def _check_alike(runs: Iterable[FinishedRun]) -> None:
    first: dict[str, FinishedRun] = {}
    for run in runs:
        other = first.setdefault(run.task, run)
        for key in ("lr", "steps", "recipe", "split", "features_alone"):
            if getattr(run, key) != getattr(other, key):
                raise DataError(
                    f"{other.folder} and {run.folder} differ in {key}; move one of them away and "
                    "run the study again"
                )


def _drop_incomplete(grouped: dict[tuple[str, str], dict[int, list[FinishedRun]]]) -> None:
    """Drop the seeds of a row that lack a fold which another student has."""
    folds: dict[str, set] = {}
    for (_, task), seeds in grouped.items():
        for runs in seeds.values():
            folds.setdefault(task, set()).update(run.fold for run in runs)
    for (_, task), seeds in grouped.items():
        incomplete = [s for s, runs in seeds.items() if {r.fold for r in runs} != folds[task]]
        for seed in incomplete:
            del seeds[seed]
