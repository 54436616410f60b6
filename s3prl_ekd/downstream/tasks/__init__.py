"""SUPERB's tasks in s3prl, a file for each; :data:`TASKS` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import SetupError
from .asr import ASR
from .asv import ASV
from .er import ER
from .ic import IC
from .ks import KS
from .pr import PR
from .qbe import QBE
from .sd import SD
from .sf import SF
from .sid import SID
from .task import Metric, Task, missing_paths, recipe_paths

__all__ = [
    "COLUMNS",
    "DEFAULT_TASKS",
    "TASKS",
    "Column",
    "Metric",
    "Task",
    "choose_tasks",
    "missing_paths",
    "recipe_paths",
    "task_of",
]

TASKS = {
    task.name: task for task in (PR, SID, ER, ASR, KS, IC, SF, ASV, SD, QBE)
}  # the order of all tables
DEFAULT_TASKS = ("pr", "sid", "er", "asr")


@dataclass(frozen=True)
class Column:
    """A column of a table of results: a metric of a task."""

    task: Task
    metric: Metric

    @property
    def title(self) -> str:
        """Title as in SUPERB's tables: ``PR PER ↓``."""
        return f"{self.task.name.upper()} {self.metric.name.upper()} {self.metric.arrow}"


# name -> column: a task's name for its main metric, sf_cer for a further one
COLUMNS = {
    name: Column(task, metric) for task in TASKS.values() for name, metric in task.columns.items()
}


def task_of(downstream: str | None, config: Mapping[str, Any]) -> Task | None:
    """The task of a recipe and its ``-d`` name; None for s3prl's other recipes."""
    return next((task for task in TASKS.values() if task.is_task_of(downstream, config)), None)


def choose_tasks(names: Sequence[str], allowed: Sequence[str] = tuple(TASKS)) -> list[Task]:
    """The named tasks, or ``all``, in the order of the tables.

    Raises:
        SetupError: a name is not in ``allowed``.
    """
    if list(names) == ["all"]:
        return [TASKS[name] for name in allowed]
    for name in names:
        if name not in allowed:
            raise SetupError(
                f"unknown task {name!r}; expected some of: {', '.join(allowed)}, or all"
            )
    return [task for task in TASKS.values() if task.name in names]
