"""Test results of one student, from the folders that ``s3prl-ekd superb`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .metrics import TaskMetric
from .plan import Upstream
from .report import make_report
from .results import CLEAN, Results, read_results


@dataclass(frozen=True, eq=False)
class StudentResults:
    """Results of a student on clean speech.

    Attributes:
        metrics: column (:data:`..downstream.tasks.COLUMNS`) -> its test metric.
        others: the upstreams in the folders, if the student is none of them.
    """

    metrics: dict[str, TaskMetric]
    others: tuple[str, ...] = ()


def student_results(folders: Sequence[Path], checkpoint: str) -> StudentResults:
    """Find the finished runs of a student by its contents, not by its name.

    Args:
        folders: see :func:`.read_results`.
        checkpoint: as given to ``superb``: the path of a file or folder, or a pinned id.

    Raises:
        DataError: the student has results under several names; see also :func:`.read_results` and
            :func:`.make_report`.
    """
    results = read_results(folders)
    digest = Upstream("student", "ekd_student", checkpoint).digest
    runs = tuple(run for run in results.runs if run.model == digest)
    if not runs:
        return StudentResults({}, results.upstreams)
    name, *others = dict.fromkeys(run.upstream for run in runs)
    if others:  # perhaps with other recipes
        raise DataError(
            f"the student was evaluated as {name} and as {', '.join(others)}; move the folders of "
            "all names but one to another place"
        )
    unfinished = tuple(folder for folder in results.unfinished if name in folder.parts)
    report = make_report(Results(runs, unfinished, {}))
    metrics = {
        column: metric
        for (_, column, condition), metric in report.metrics.items()
        if condition == CLEAN
    }
    return StudentResults(metrics)
