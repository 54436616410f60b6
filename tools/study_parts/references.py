"""Which results for reference were not run like the students, so that nobody compares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from s3prl_ekd.files.config import read_yaml
from s3prl_ekd.superb.results import FinishedRun

from .cells import Cell

FACTS = {"features_alone": "features", "steps": "steps", "recipe": "recipe"}


def differing(
    names: Iterable[str],
    of_students: Sequence[FinishedRun],
    grouped: Mapping[tuple[str, str], Mapping[int, list[FinishedRun]]],
    cells: Mapping[tuple[str, str, str], Cell],
) -> dict[str, tuple[str, ...]]:
    """``name/task`` of references -> what differs: features, steps, recipe, probe, test set.

    The learning rate does not count: a reference's was chosen on dev.

    Args:
        names: of the references.
        of_students: all runs of the students, which are alike within a task.
        grouped: (row, task) -> seed -> runs, of references and students.
        cells: (row, metric's key, condition) -> cell, of both.
    """
    students = {run.task: run for run in of_students}
    rows = {row for row, _ in grouped} - set(names)
    found = {}
    for (name, task), seeds in grouped.items():
        if name in rows or task not in students:
            continue
        runs, ours = [run for runs in seeds.values() for run in runs], students[task]
        what = [
            word
            for key, word in FACTS.items()
            if any(getattr(run, key) != getattr(ours, key) for run in runs)
        ]
        if any(None not in (a := _probe(run), b := _probe(ours)) and a != b for run in runs):
            what.append("probe")
        if _other_test_set(name, task, rows, cells):
            what.append("test set")
        if what:
            found[f"{name}/{task}"] = tuple(what)
    return found


def _probe(run: FinishedRun) -> Any:
    """The downstream model, of the config that s3prl keeps; None where there is none."""
    kept = sorted(run.folder.glob("config_*.yaml"))
    expert = read_yaml(kept[-1]).get("downstream_expert", {}) if kept else {}
    return expert.get("model", expert.get("modelrc"))


def _other_test_set(name: str, task: str, rows: set[str], cells: Mapping) -> bool:
    tested: dict[tuple[str, str], set] = {}
    for (row, key, condition), cell in cells.items():
        if row in rows and cell.metric.task == task:
            tested.setdefault((key, condition), set()).add(cell.test_set)
    return any(
        row == name
        and cell.metric.task == task
        and (key, condition) in tested
        and cell.test_set not in tested[key, condition]
        for (row, key, condition), cell in cells.items()
    )
