"""The records of ``s3prl-ekd superb``, and the choice among finished runs by their dev scores.

``ROOT/UPSTREAM/TASK/RUN/superb.json`` says what a run was and where its predictions lie;
``ROOT/UPSTREAM/cost.json``, where there is one, how large the upstream is.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..downstream.tasks import TASKS
from ..errors import DataError
from ..files.config import build
from ..files.formats import refuse_newer
from ..files.text import read_json

RECORD, COST = "superb.json", "cost.json"

_RUN = re.compile(r"lr[^/]+-seed\d+(-(?P<fold>fold\d+))?")


@dataclass(frozen=True)
class Dev:
    """A metric in per cent on the development set, and the checkpoint that reached it."""

    metric: Literal["per", "wer", "acc"]
    value: float
    checkpoint: str | None = None


@dataclass(frozen=True)
class Record:
    """The contents of ``superb.json``.

    Attributes:
        tested: condition (``clean``, ``babble_snr5``) -> folder of its predictions, relative to
            the run's.
        model: of what decides the upstream's outputs; None in records of earlier versions.
        noises: condition -> digest of its noises.
        features_alone: the hidden states are of each utterance alone (``--cache-features``), and
            not of padded batches.
    """

    format: Literal[1]
    upstream: str
    hub: str
    checkpoint: str | None
    task: Literal["pr", "sid", "er", "asr"]
    lr: float
    seed: int
    fold: str | None
    steps: int
    recipe: str
    split: str
    digest: str
    dev: Dev
    tested: dict[str, str]
    seconds: float
    finished: Literal[True]
    features_alone: bool = False
    model: str | None = None
    noises: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.fold is not None) != (self.task == "er"):
            raise ValueError("fold must be named for er, and null for every other task")
        if self.fold is not None and not re.fullmatch(r"fold\d+", self.fold):
            raise ValueError(f"fold is {self.fold!r}; fold1, fold2, ... is expected")
        task = TASKS[self.task]
        if self.split != task.split or self.dev.metric != task.metric:
            raise ValueError(
                f"split and dev.metric of {task.name} must be {task.split} and {task.metric}"
            )
        if not self.upstream.strip() or not self.tested:
            raise ValueError("upstream and tested must not be empty")
        for name in (self.upstream, self.recipe, *self.tested):  # they go into reports
            if not name.isprintable():
                raise ValueError(f"{name!r} is no name: it has characters that cannot be printed")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr:g}; a number above 0 is expected")
        check_paths({"tested": self.tested, "dev": vars(self.dev)})


def check_paths(record: Mapping[str, Any]) -> None:
    """Refuse a record whose paths lead out of the run's folder: they name what is read and written.

    Raises:
        ValueError, TypeError: naming the entry.
    """
    checkpoint = (record.get("dev") or {}).get("checkpoint")
    if checkpoint is not None and PurePosixPath(checkpoint).name != checkpoint:
        raise ValueError(f"dev.checkpoint is {checkpoint!r}, which is no name of a file in the run")
    for condition, folder in record.get("tested", {}).items():
        path = PurePosixPath(folder)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"tested.{condition} is {folder!r}, which is outside the run")


@dataclass(frozen=True)
class Run(Record):
    """A finished run: its record and where it lies."""

    folder: Path = field(kw_only=True)

    def files(self, condition: str) -> tuple[Path, Path]:
        """Predictions and references of the test set under ``condition``."""
        where = self.folder / self.tested[condition]
        hyp, ref = TASKS[self.task].files(self.fold)
        return where / hyp, where / ref


@dataclass(frozen=True)
class Cost:
    """The contents of ``cost.json``: parameters, and MACs over some utterances.

    ``macs_products`` are those of matrix products and convolutions alone.
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


def read_run(folder: Path) -> Run | None:
    """The finished run in ``folder``, or None where it is not finished.

    The folder's place, ``ROOT/UPSTREAM/TASK/RUN``, says which upstream it is of: it may have been
    renamed since.

    Raises:
        DataError: its record is damaged.
    """
    path = folder / RECORD
    data = _read_json(path)
    if data is None:
        return None
    refuse_newer(data.get("format"), 1, f"the record {path}", DataError)
    if data.get("finished") is False:
        return None
    facts = vars(build(Record, data, str(path)))
    task = folder.resolve().parent
    if task.name == facts["task"]:
        facts = {**facts, "upstream": task.parent.name}
    return Run(**facts, folder=folder)


def read_cost(path: Path) -> Cost | None:
    """The cost of an upstream, or None where nobody has measured it.

    Raises:
        DataError: the file is damaged.
    """
    data = _read_json(path)
    if data is None:
        return None
    refuse_newer(data.get("format", 1), 1, f"the record {path}", DataError)
    return build(Cost, data, str(path))


def _read_json(path: Path) -> dict | None:
    """A JSON mapping; None where there is no such file."""
    if not path.exists():
        return None
    try:
        return read_json(path, "record", DataError)
    except DataError as error:
        raise DataError(f"{path} is damaged: {error}; remove it and run again") from None


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
    runs: list[Run] = []
    unfinished: list[Path] = []
    for folder in found:
        run = read_run(folder)
        if run is None:
            unfinished.append(folder)
        else:
            runs.append(run)
    _check_alike(runs)
    costs: dict[str, Cost] = {}
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
