"""The checkpoint files of a run, each complete or absent, and the progress that they hold.

``states-STEP.ckpt`` at every ``save_step``, of which the newest ``max_keep`` stay; ``last.ckpt``,
the newest of them under a second name, or what was saved since; and ``dev-best.ckpt``, of the
lowest dev loss.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SetupError
from ..files.atomic import remove_leftovers, save_whole, second_name
from ..files.formats import CHECKPOINT_PARTS, RUN_STATE, NewerFormatError, refuse_newer
from ..files.run_checkpoints import LAST, read_run, run_checkpoints

logger = logging.getLogger(__name__)


KEY = RUN_STATE  # in a checkpoint; all of the trainer's own state is under it
VERSION = CHECKPOINT_PARTS[KEY]

BEST = "dev-best.ckpt"
_NUMBERED = re.compile(r"states-(\d+)\.ckpt")


@dataclass
class Progress:
    """How far a run is; it changes at whole steps only.

    ``step``: steps done, skipped ones included. ``epoch`` and ``batch``: the pass over the data,
    and how many batches of it are used, by all processes together. ``batches``: of one pass.
    ``tables``: digest of each corpus table. ``skipped``, ``skipped_in_a_row``: steps that were not
    finite. ``best_loss``, ``best_step``: of the dev tables. ``scaler``: the loss scale of fp16.
    ``records``: the scalars since TensorBoard's last point. ``dev_due``: the dev loss of this step
    is still to be measured; a signal or an error came before.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 0
    tables: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    dev_due: bool = False
    records: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def state_dict(self, random: list[dict]) -> dict[str, Any]:
        """As plain data and tensors.

        Args:
            random: the random states of each process, by rank.
        """
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["records"] = {
            name: torch.stack([value.float().cpu() for value in values])
            for name, values in self.records.items()
        }
        return {"version": VERSION, "random": random, **data}

    @staticmethod
    def from_state_dict(data: Any, path: str) -> Progress:
        """The inverse of :meth:`state_dict`; unknown keys are ignored.

        Args:
            data: of a checkpoint.
            path: of the checkpoint, for messages.

        Raises:
            CheckpointError: ``data`` is damaged or of a newer version.
        """
        try:
            refuse_newer(data["version"], VERSION, f"{path} ({KEY})")
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']!r:.20}")
            data = {"dev_due": False, **data}  # version 0.1 did not write it
            values = {field.name: data[field.name] for field in dataclasses.fields(Progress)}
            counts = ("step", "epoch", "batch", "batches", "skipped", "skipped_in_a_row")
            if not all(type(values[name]) is int and values[name] >= 0 for name in counts):
                raise TypeError("a count is no whole number")
            records = {name: list(points.unbind()) for name, points in values["records"].items()}
            values["records"] = defaultdict(list, records)
            values["tables"], values["scaler"] = dict(values["tables"]), dict(values["scaler"])
            if not isinstance(data["random"], list):
                raise TypeError("random is no list")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: its run state ({KEY}): {error}") from None
        return Progress(**values)


class SaveError(SetupError):
    """A checkpoint could not be written; the message says where and how to go on."""


class CheckpointManager:
    """Write and prune the checkpoints in a run's folder.

    Args:
        folder: exists.
        max_keep: how many numbered checkpoints stay.
        hint: how to resume, for messages.
    """

    def __init__(self, folder: str | Path, max_keep: int, hint: str):
        self.folder = Path(folder)
        self.max_keep = max_keep
        self.hint = hint

    def save_numbered(self, states: Mapping, step: int) -> Path:
        """Save as ``states-STEP.ckpt`` and ``last.ckpt``, then remove the oldest beyond max_keep.

        Raises:
            SaveError: there is no room, for example. Earlier checkpoints are kept.
        """
        path = self._write(states, f"states-{step}.ckpt")
        try:
            second_name(path, self.folder / LAST)
        except OSError as error:
            raise self._error(self.folder / LAST, error) from None
        # Damaged files of later steps may be left, which do not count.
        numbered = sorted(number for number in self._numbers() if number <= step)
        for old in numbered[: -self.max_keep]:
            (self.folder / f"states-{old}.ckpt").unlink(missing_ok=True)
        return path

    def save_last(self, states: Mapping) -> Path:
        """Save as ``last.ckpt`` only. Raises SaveError, as :meth:`save_numbered` does."""
        return self._write(states, LAST)

    def save_best(self, states: Mapping) -> Path:
        """Save as ``dev-best.ckpt``. Raises SaveError, as :meth:`save_numbered` does."""
        return self._write(states, BEST)

    def prune(self, step: int) -> None:
        """Prepare the folder for a run that resumes at ``step``.

        Incomplete files of a killed process are removed. Checkpoints of later steps are renamed:
        the next ``-a`` would resume from one of them otherwise.
        """
        remove_leftovers(self.folder, "*.ckpt")
        for path in run_checkpoints(self.folder):
            try:
                newer = int(read_run(path)["Step"]) > step
            except NewerFormatError:
                raise
            except (CheckpointError, ValueError, TypeError):
                continue  # damaged: ignored when resuming, and overwritten in time
            if newer:
                logger.warning("%s is of a later step: renamed to %s.old", path, path.name)
                path.replace(path.with_name(f"{path.name}.old"))

    def _numbers(self) -> list[int]:
        names = (_NUMBERED.fullmatch(path.name) for path in self.folder.glob("states-*.ckpt"))
        return [int(name[1]) for name in names if name]

    def _write(self, states: Mapping, name: str) -> Path:
        path = self.folder / name
        try:
            save_whole(dict(states), path)
        except OSError as error:
            raise self._error(path, error) from None
        return path

    def _error(self, path: Path, error: OSError) -> SaveError:
        return SaveError(
            f"cannot save {path}: {error.strerror}; the checkpoints saved before it are as they "
            f"were; make room, then {self.hint}"
        )
