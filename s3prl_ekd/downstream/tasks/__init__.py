"""SUPERB's tasks in s3prl, a file for each; :data:`TASKS` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import SetupError
from .asr import ASR
from .er import ER
from .ic import IC
from .ks import KS
from .pr import PR
from .sid import SID
from .task import Metric, Task, missing_paths, recipe_paths

__all__ = [
    "DEFAULT_TASKS",
    "TASKS",
    "Metric",
    "Task",
    "choose_tasks",
    "missing_paths",
    "recipe_paths",
    "task_of",
]

TASKS = {task.name: task for task in (PR, SID, ER, ASR, KS, IC)}  # the order of all tables
DEFAULT_TASKS = ("pr", "sid", "er", "asr")


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
