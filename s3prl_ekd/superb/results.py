"""Read the records of ``s3prl-ekd superb``, and choose learning rates by the dev metric.

``ROOT/UPSTREAM/TASK/RUN/superb.json`` describes a run and the folders of its predictions.
``ROOT/UPSTREAM/cost.json``, if it exists, contains the upstream's parameters and MACs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from ..downstream.metrics.sample import Sample
from ..downstream.tasks import TASKS, Task
from ..errors import ConfigError, DataError
from ..files.config import from_plain_data
from ..files.formats import check_format_version
from ..files.run_checkpoints import RECORD
from ..files.text import read_json

COST = "cost.json"
RecordT = TypeVar("RecordT")

CLEAN = "clean"  # the condition without noise
UNTRAINED = "untrained"  # in a run's name, in place of a learning rate
_RUN = re.compile(rf"(lr[^/]+|{UNTRAINED})-seed\d+(-(?P<fold>fold\d+))?")


@dataclass(frozen=True)
class DevMetric:
    """What is tested: a checkpoint of the run or a layer of the upstream, and by which metric.

    Attributes:
        value: in per cent, on the development set; for tasks without one, on the test set.
        layer: of a task without training; it has no checkpoint.
    """

    metric: str
    value: float
    checkpoint: str | None = None
    layer: int | None = None

    @property
    def chosen(self) -> str:
        """What is tested: ``layer 3`` or ``dev-best``."""
        return (
            str(self.checkpoint).removesuffix(".ckpt")
            if self.layer is None
            else f"layer {self.layer}"
        )

    def check(self, task: Task) -> None:
        """Raise ValueError unless there is a checkpoint or a layer, as ``task`` needs it."""
        name, layer = self.checkpoint, self.layer
        if task.trained and (layer is not None or not re.fullmatch(r"[\w-]+\.ckpt", name or "")):
            raise ValueError(
                f"dev.checkpoint of {task.name} must be like dev-best.ckpt, got {name!r}, and "
                f"dev.layer null, got {layer}"
            )
        if not task.trained and (name is not None or layer is None or layer < 0):
            raise ValueError(
                f"dev.layer of {task.name} must be 0 or more, got {layer}, and dev.checkpoint "
                f"null, got {name!r}"
            )


@dataclass(frozen=True)
class RunRecord:
    """The contents of ``superb.json``: what was planned, and what is done.

    Attributes:
        lr: None for a task without training.
        digest: SHA-256 of what determines the result.
        dev: None until the run is trained and a checkpoint or layer chosen.
        tested: condition (``clean``, ``babble_snr5``) -> folder of its predictions, relative to
            the run's folder.
        seconds: duration of the training; 0 until it is finished.
        features_alone: hidden states without padding (``--cache-features``).
        model: SHA-256 of what determines the upstream's outputs; None in records of old versions.
        noises: condition -> SHA-256 of its noises.
        recipe_digest: SHA-256 of the recipe's settings without learning rate and fold, and of the
            prepared corpus; None in records of old versions.
        folds: all test folds of the recipe; None for a task without folds, and in records of old
            versions.
    """

    format: Literal[1]
    upstream: str
    hub: str
    checkpoint: str | None
    task: str
    lr: float | None
    seed: int
    fold: str | None
    steps: int
    recipe: str
    split: str
    digest: str
    dev: DevMetric | None = None
    tested: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: bool = False
    features_alone: bool = False
    model: str | None = None
    noises: dict[str, str] = field(default_factory=dict)
    recipe_digest: str | None = None
    folds: list[str] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task[:40]!r}")
        task = TASKS[self.task]
        has_folds = task.find_folds is not None
        if bool(re.fullmatch(r"fold\d+", self.fold or "")) != has_folds:
            folds = "fold1, ..." if has_folds else "null"
            raise ValueError(f"fold must be {folds} for {task.name}, got {self.fold!r}")
        if self.folds is not None and self.fold not in self.folds:
            raise ValueError(f"folds must contain {self.fold}, got {self.folds}")
        if not all(re.fullmatch(r"fold\d+", fold) for fold in self.folds or ()):
            raise ValueError(f"folds must be like fold1, got {self.folds}")
        metric = self.dev.metric if self.dev else task.dev.name
        if (self.split, metric) != (task.split, task.dev.name):
            raise ValueError(
                f"split and dev.metric of {task.name} must be {task.split} and {task.dev.name}, "
                f"got {self.split!r} and {metric!r}"
            )
        if self.finished and not (self.dev and self.tested):
            raise ValueError("dev and tested of a finished run must not be empty")
        if not self.upstream.strip():
            raise ValueError("upstream must not be empty")
        for name in (self.upstream, self.recipe, *self.tested):  # printed in reports
            if not name.isprintable():
                raise ValueError(f"expected printable characters in names, got {name!r}")
        if (self.lr is not None) != task.trained:
            expected = "a number" if task.trained else "null"
            raise ValueError(f"lr must be {expected} for {task.name}, got {self.lr}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr:g}")
        if self.dev:
            self.dev.check(task)
        # the paths are read and written
        for condition, folder in self.tested.items():
            path = PurePosixPath(folder)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(
                    f"tested.{condition} must be inside the run's folder, got {folder!r}"
                )


@dataclass(frozen=True)
class FinishedRun(RunRecord):
    """The record of a finished run, and its folder."""

    dev: DevMetric
    folder: Path = field(kw_only=True)

    def files(self, condition: str) -> tuple[Path, ...]:
        """The predictions and references of the test set under ``condition``."""
        folder = self.folder / self.tested[condition]
        return tuple(folder / name for name in TASKS[self.task].files(self.fold))

    def measure(self, condition: str) -> tuple[Sample, ...]:
        """The results on the test set under ``condition``, for each metric of the task."""
        return TASKS[self.task].measure(self.folder / self.tested[condition], self.fold)


@dataclass(frozen=True)
class Cost:
    """The contents of ``cost.json``; see :mod:`.cost`.

    Attributes:
        unused: parameters that no hidden state depends on.
        macs: sum over the utterances; ``macs_buckets`` by length, ``macs_products`` of matrix
            products and convolutions alone.
    """

    parameters: int
    unused: int
    macs: float
    macs_buckets: dict[str, float]
    utterances: int
    profiler: str
    macs_products: float | None = None

    def __post_init__(self) -> None:
        if self.parameters < 0 or self.macs < 0:
            raise ValueError("parameters and macs must not be negative")


def read_record(folder: Path) -> RunRecord | None:
    """Read the record of the run in ``folder``; None if there is none."""
    return _read(RunRecord, folder / RECORD)


def read_finished_run(folder: Path) -> FinishedRun | None:
    """Read the run in ``folder``; None if it is not finished.

    The upstream's name is taken from the path ``ROOT/UPSTREAM/TASK/RUN``, as the folder may have
    been renamed.
    """
    record = read_record(folder)
    if record is None or not record.finished:
        return None
    task_folder = folder.resolve().parent
    if task_folder.name == record.task:
        record = replace(record, upstream=task_folder.parent.name)
    return FinishedRun(**vars(record), folder=folder)


def read_cost(path: Path) -> Cost | None:
    """Read an upstream's ``cost.json``; None if there is no such file."""
    return _read(Cost, path)


def _read(kind: type[RecordT], path: Path) -> RecordT | None:
    """Read a record; None if there is no such file.

    Raises:
        EkdError: the file is damaged or of a newer version.
    """
    if not path.exists():
        return None
    # a record goes with its folder: a checkpoint without it could be of another recipe
    damaged = path.parent if path.name == RECORD else path
    hint = f"remove {damaged} and run superb again"
    try:
        data = read_json(path, "record", DataError)
    except DataError as error:
        raise DataError(f"{path} is damaged: {error}; {hint}") from None
    check_format_version(data.get("format", 1), 1, f"the record {path}", DataError)
    try:
        return from_plain_data(kind, data, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; {hint}") from None


@dataclass(frozen=True)
class Results:
    """Finished runs, folders of unfinished runs, and costs by upstream."""

    runs: tuple[FinishedRun, ...]
    unfinished: tuple[Path, ...]
    costs: dict[str, Cost]

    @property
    def upstreams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.upstream for run in self.runs))


@dataclass(frozen=True)
class SelectedRuns:
    """The runs of one upstream and task at the learning rate with the best dev metric.

    Attributes:
        dev: the dev metric, averaged over seeds and folds, in per cent.
        runs: one for each seed and fold, sorted.
    """

    upstream: str
    task: str
    lr: float | None
    dev: float
    runs: tuple[FinishedRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def folds(self) -> tuple[str | None, ...]:
        return tuple(dict.fromkeys(run.fold for run in self.runs))

    @property
    def recipe_digest(self) -> str | None:
        """That of the runs; None if all are of old versions."""
        return next((run.recipe_digest for run in self.runs if run.recipe_digest), None)


def read_results(folders: Sequence[Path]) -> Results:
    """Read all runs in ``folders``, each a root or the folder of an upstream, a task or a run.

    Raises:
        DataError: a folder is missing or has no runs; a record or cost is damaged; two runs have
            the same upstream, task, learning rate, seed and fold; or runs of an upstream are not
            comparable.
    """
    read: dict[Path, FinishedRun | None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"no such folder {folder}; name one that s3prl-ekd superb wrote")
        inside = {p: read_finished_run(p) for p in map(Path.resolve, _run_folders(folder, 3))}
        if not inside:
            raise DataError(f"no runs in {folder}; name a folder that s3prl-ekd superb wrote")
        read |= inside
    runs = tuple(run for run in read.values() if run is not None)
    unfinished = tuple(folder for folder, run in read.items() if run is None)
    _check_comparable(runs)
    costs: dict[str, Cost] = {}
    for run in runs:
        cost = read_cost(run.folder.parent.parent / COST)
        if cost is not None and costs.setdefault(run.upstream, cost) != cost:
            raise DataError(f"two {COST} of {run.upstream} differ; report the folders separately")
    return Results(runs, unfinished, costs)


def check_known_upstream(name: str, names: Collection[str]) -> None:
    """Raise DataError if ``name`` is not one of the upstreams ``names``."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise DataError(f"no such upstream {name}{guess}; expected one of: {', '.join(names)}")


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RECORD).is_file() or _RUN.fullmatch(folder.resolve().name):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                yield from _run_folders(child, depth - 1)


def _check_comparable(runs: Iterable[FinishedRun]) -> None:
    first: dict[tuple, FinishedRun] = {}
    for run in runs:
        upstream, task = (run.upstream,), (run.upstream, run.task)
        key = (*task, run.lr, run.seed, run.fold)
        other = first.setdefault(key, run)
        if other is not run:
            raise DataError(
                f"{other.folder} and {run.folder} have the same upstream, task, lr, seed and fold; "
                "report only one of them"
            )
        other = first.setdefault(upstream, run)
        known = None not in (other.model, run.model)  # unknown in records of old versions
        names = ((other.hub, other.checkpoint), (run.hub, run.checkpoint))
        if other.model != run.model if known else names[0] != names[1]:
            raise _not_comparable(other, run, f"use different models under the name {run.upstream}")
        other = first.setdefault(task, run)
        if (other.recipe, other.steps, other.split) != (run.recipe, run.steps, run.split):
            raise _not_comparable(other, run, "differ in recipe, steps or test set")
        if run.recipe_digest is not None:  # unknown in records of old versions
            other = first.setdefault((*task, "recipe"), run)
            if other.recipe_digest != run.recipe_digest:
                raise _not_comparable(
                    other,
                    run,
                    "differ in settings of the recipe (--override, an edited YAML) or in the "
                    "prepared corpus",
                )
        if other.features_alone != run.features_alone:
            raise _not_comparable(other, run, "differ in --cache-features, which changes scores")


def _not_comparable(first: FinishedRun, second: FinishedRun, reason: str) -> DataError:
    return DataError(
        f"{first.folder} and {second.folder} {reason}; move one of them away, or report them "
        "separately"
    )


def select_best_lr(
    runs: Iterable[FinishedRun], unfinished: Collection[Path] = ()
) -> dict[tuple[str, str], SelectedRuns]:
    """Choose for each upstream and task the learning rate with the best dev metric.

    Best is the lowest or highest mean over seeds and folds of the metric that chooses the
    checkpoints (:attr:`.Task.dev`); ties go to the smallest learning rate. A learning rate is
    considered only if it has every seed with every fold, because ER is a mean over all folds: those
    of the recipe, as far as it is recorded, and of the runs, also unfinished ones. If there is
    none, the upstream and task are left out; see :func:`incomplete`.

    Args:
        runs: finished runs.
        unfinished: folders of unfinished runs.

    Returns:
        (upstream, task) -> runs at the best learning rate, in the order of ``runs``.
    """
    selections = {}
    for (upstream, task), (required, by_lr) in _by_task(runs, unfinished).items():
        complete = {lr: group for lr, group in by_lr.items() if group.keys() == required}
        sums = {lr: math.fsum(r.dev.value for r in g.values()) for lr, g in complete.items()}
        if complete:
            sign = -1 if TASKS[task].dev.higher_is_better else 1
            _, best = min((sign * value, lr) for lr, value in sums.items())
            ordered = tuple(complete[best][key] for key in sorted(required, key=_numeric_key))
            selections[upstream, task] = SelectedRuns(
                upstream, task, best, sums[best] / len(ordered), ordered
            )
    return selections


def incomplete(runs: Iterable[FinishedRun], unfinished: Collection[Path] = ()) -> list[str]:
    """List missing seeds and folds, one line per upstream, task and incomplete learning rate.

    Args: as for :func:`select_best_lr`.
    """
    lines = []
    for (upstream, task), (required, by_lr) in _by_task(runs, unfinished).items():
        for lr, group in sorted(by_lr.items(), key=lambda item: item[0] or 0.0):
            missing = [
                f"seed {seed}{f' {fold}' if fold else ''}"
                for seed, fold in sorted(required - group.keys(), key=_numeric_key)
            ]
            if missing:
                rate = UNTRAINED if lr is None else f"lr {lr:g}"
                lines.append(f"{upstream}, {task}, {rate}: no {', '.join(missing)}")
    return lines


_Key = tuple[int, str | None]  # seed, fold


def _by_task(
    runs: Iterable[FinishedRun], unfinished: Collection[Path]
) -> dict[tuple[str, str], tuple[set[_Key], dict[float | None, dict[_Key, FinishedRun]]]]:
    """(upstream, task) -> every seed with every fold, and learning rate -> (seed, fold) -> run.

    Folds of unfinished runs are read from their folder names.
    """
    by_task: dict[tuple[str, str], dict[float | None, dict[_Key, FinishedRun]]] = {}
    for run in runs:
        by_lr = by_task.setdefault((run.upstream, run.task), {})
        by_lr.setdefault(run.lr, {})[run.seed, run.fold] = run
    grouped = {}
    for task, by_lr in by_task.items():
        keys = {key for group in by_lr.values() for key in group}
        folds = {fold for _, fold in keys}
        folds.update(*(run.folds or () for group in by_lr.values() for run in group.values()))
        matches = (_RUN.fullmatch(p.name) for p in unfinished if p.parts[-3:-1] == task)
        folds |= {match["fold"] for match in matches if match and match["fold"]}
        grouped[task] = set(product({seed for seed, _ in keys}, folds)), by_lr
    return grouped


def _numeric_key(key: _Key) -> tuple[int, int]:
    seed, fold = key
    return seed, int(fold.removeprefix("fold")) if fold else 0
