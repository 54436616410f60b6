"""What ``s3prl-ekd superb`` leaves of a downstream run, and of an upstream's cost.

``ROOT/UPSTREAM/TASK/RUN/superb.json`` says what a run was and where its predictions lie;
``ROOT/UPSTREAM/cost.json``, where there is one, how large the upstream is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ..downstream.tasks import TASKS
from ..errors import DataError
from ..files.config import build
from ..files.formats import refuse_newer
from ..files.text import read_json

RECORD, COST = "superb.json", "cost.json"


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
