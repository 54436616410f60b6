"""Find references that were run with other settings than the students, to flag them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from s3prl_ekd.files.config import read_yaml
from s3prl_ekd.superb.results import FinishedRun

from .cells import Cell

COMPARED = {"features_alone": "features", "steps": "steps", "recipe": "recipe"}


def reference_differences(
    names: Iterable[str],
    student_runs: Sequence[FinishedRun],
    grouped: Mapping[tuple[str, str], Mapping[int, list[FinishedRun]]],
    cells: Mapping[tuple[str, str, str], Cell],
) -> dict[str, tuple[str, ...]]:
    """Map ``name/task`` of references to what differs: features, steps, recipe, probe, test set.

    The learning rate is not compared: that of a reference was chosen on dev.

    Args:
        names: of the references.
        student_runs: all runs of the students, which have the same settings within a task.
        grouped: (row, task) -> seed -> runs, of references and students.
        cells: (row, metric's key, condition) -> cell, of both.
    """
    students = {run.task: run for run in student_runs}
    rows = {row for row, _ in grouped} - set(names)
    differences = {}
    for (name, task), seeds in grouped.items():
        if name in rows or task not in students:
            continue
        runs, student = [run for runs in seeds.values() for run in runs], students[task]
        differing = [
            label
            for key, label in COMPARED.items()
            if any(getattr(run, key) != getattr(student, key) for run in runs)
        ]
        if any(None not in (a := _probe(run), b := _probe(student)) and a != b for run in runs):
            differing.append("probe")
        if _other_test_set(name, task, rows, cells):
            differing.append("test set")
        if differing:
            differences[f"{name}/{task}"] = tuple(differing)
    return differences


def _probe(run: FinishedRun) -> Any:
    """The downstream model in the config that s3prl saved; None without such a file."""
    configs = sorted(run.folder.glob("config_*.yaml"))
    expert = read_yaml(configs[-1]).get("downstream_expert", {}) if configs else {}
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
