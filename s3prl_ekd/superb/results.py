"""All finished runs below some folders, and the choice among them by dev."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..downstream.tasks import TASKS
from ..errors import DataError
from .records import COST, RECORD, Cost, Run, read_cost, read_run

_RUN = re.compile(r"lr[^/]+-seed\d+(-(?P<fold>fold\d+))?")


@dataclass(frozen=True)
class Results:
    """What was found: finished runs, folders of unfinished ones, costs by upstream."""

    runs: tuple[Run, ...]
    unfinished: tuple[Path, ...]
    costs: dict[str, Cost]

    @property
    def upstreams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.upstream for run in self.runs))


@dataclass(frozen=True)
class Selection:
    """The runs of one upstream and task at the learning rate that is best on dev.

    Attributes:
        dev: the mean over seeds and folds, per cent.
        runs: one for each seed and fold, sorted.
    """

    upstream: str
    task: str
    lr: float
    dev: float
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def folds(self) -> tuple[str | None, ...]:
        return tuple(dict.fromkeys(run.fold for run in self.runs))


def read_results(folders: Sequence[Path]) -> Results:
    """Read every run below ``folders``: roots, or folders of an upstream, a task or a run.

    Raises:
        DataError: a folder is missing or has no runs; a record is damaged; two runs claim to be
            the same, or two of one upstream and task were run differently.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; name one that s3prl-ekd superb has written")
        below = dict.fromkeys(path.resolve() for path in _run_folders(folder, 3))
        if not below:
            raise DataError(f"no runs in {folder}; s3prl-ekd superb writes them")
        found |= below
    runs, unfinished = [], []
    for folder in found:
        run = read_run(folder)
        (unfinished if run is None else runs).append(folder if run is None else run)
    _check_alike(runs)
    costs = {}
    for run in runs:
        cost = read_cost(run.folder.parent.parent / COST)
        if cost is not None and costs.setdefault(run.upstream, cost) != cost:
            raise DataError(f"two files {COST} of {run.upstream} differ; report one folder alone")
    return Results(tuple(runs), tuple(unfinished), costs)


def check_upstream(name: str, known: Collection[str]) -> None:
    """Raises DataError, with the names there are, where ``name`` is not in ``known``."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise DataError(f"no upstream {name} here{guess}; there are: {', '.join(known)}")


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RECORD).is_file() or _RUN.fullmatch(folder.resolve().name):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                yield from _run_folders(child, depth - 1)


def _check_alike(runs: Iterable[Run]) -> None:
    same: dict[tuple, Run] = {}
    upstreams: dict[str, Run] = {}
    tasks: dict[tuple, Run] = {}
    for run in runs:
        twin = same.setdefault((run.upstream, run.task, run.lr, run.seed, run.fold), run)
        if twin is not run:
            raise DataError(f"{twin.folder} and {run.folder} say they are the same run; name one")
        other = upstreams.setdefault(run.upstream, run)
        models = {r.model for r in (other, run) if r.model is not None}
        if (other.hub, other.checkpoint) != (run.hub, run.checkpoint) or len(models) > 1:
            raise DataError(
                f"{other.folder} and {run.folder} are of different models under one name, "
                f"{run.upstream}; report them apart"
            )
        other = tasks.setdefault((run.upstream, run.task), run)
        if (other.recipe, other.steps, other.split) != (run.recipe, run.steps, run.split):
            raise DataError(
                f"{other.folder} and {run.folder} differ in recipe, steps or test set; "
                "report them apart"
            )
        if other.features_alone != run.features_alone:
            raise DataError(
                f"of {other.folder} and {run.folder} one ran with --cache-features and one "
                "without it, which differ a little; report them apart"
            )


def select(
    runs: Iterable[Run], unfinished: Collection[Path] = ()
) -> dict[tuple[str, str], Selection]:
    """For each upstream and task the learning rate that is best on dev.

    Best is the lowest (per, wer) or highest (acc) mean over seeds and folds, among the learning
    rates that have every seed and fold that any of them has; the smallest one where several are
    equal. An upstream and task without such a learning rate is left out: see :func:`incomplete`.

    Args:
        runs: finished runs.
        unfinished: folders of others. Their folds are needed too: ER over some of its folds is
            another number than over all.

    Returns:
        (upstream, task) -> selection, in the order of the runs.
    """
    chosen = {}
    for (upstream, task), rates in _by_rate(runs).items():
        wanted = _wanted(rates, _folds(unfinished, upstream, task))
        sign = -1 if TASKS[task].higher_is_better else 1
        whole = [lr for lr, group in rates.items() if group.keys() == wanted]
        devs = {lr: math.fsum(r.dev.value for r in rates[lr].values()) for lr in whole}
        if whole:
            best = min(whole, key=lambda lr: (sign * devs[lr], lr))  # noqa: B023 (used at once)
            ordered = tuple(rates[best][key] for key in sorted(rates[best], key=_order))
            chosen[upstream, task] = Selection(
                upstream, task, best, devs[best] / len(ordered), ordered
            )
    return chosen


def incomplete(runs: Iterable[Run], unfinished: Collection[Path] = ()) -> list[str]:
    """A line for each upstream, task and learning rate that lacks a seed or a fold.

    Args: as for :func:`select`.
    """
    lines = []
    for (upstream, task), rates in _by_rate(runs).items():
        wanted = _wanted(rates, _folds(unfinished, upstream, task))
        for lr, group in sorted(rates.items()):
            lacking = [
                f"seed {seed}{f' {fold}' if fold else ''}"
                for seed, fold in sorted(wanted - group.keys(), key=_order)
            ]
            if lacking:
                lines.append(f"{upstream}, {task}, lr {lr:g}: no {', '.join(lacking)}")
    return lines


def _by_rate(runs: Iterable[Run]) -> dict[tuple[str, str], dict[float, dict[tuple, Run]]]:
    """(upstream, task) -> learning rate -> (seed, fold) -> run."""
    found: dict[tuple[str, str], dict[float, dict[tuple, Run]]] = {}
    for run in runs:
        rates = found.setdefault((run.upstream, run.task), {})
        rates.setdefault(run.lr, {})[run.seed, run.fold] = run
    return found


def _folds(unfinished: Iterable[Path], upstream: str, task: str) -> set[str]:
    """The folds of unfinished runs of ``upstream`` and ``task``, by the names of their folders."""
    found = {_RUN.fullmatch(p.name) for p in unfinished if p.parts[-3:-1] == (upstream, task)}
    return {match["fold"] for match in found if match and match["fold"]}


def _wanted(rates: dict[float, dict[tuple, Run]], folds: set[str]) -> set[tuple]:
    """Every seed with every fold."""
    keys = [key for group in rates.values() for key in group]
    return {(seed, fold) for seed, _ in keys for fold in folds.union(fold for _, fold in keys)}


def _order(key: tuple[int, str | None]) -> tuple[int, int]:
    seed, fold = key
    return seed, int(fold.removeprefix("fold")) if fold else 0
