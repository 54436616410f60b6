"""The checkpoints of a run and the progress stored in them.

A run writes ``states-STEP.ckpt`` at every ``save_step`` and keeps the newest ``max_keep``.
``last.ckpt`` is the newest of them under a second name, or a later checkpoint. ``dev-best.ckpt``
has the lowest dev loss. A file is either complete or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SetupError
from ..files.atomic import atomic_torch_save, link_or_copy, remove_leftovers
from ..files.formats import CHECKPOINT_PARTS, RUN_STATE, NewerFormatError, check_format_version
from ..files.run_checkpoints import LAST_CHECKPOINT, read_checkpoint, run_checkpoints

logger = logging.getLogger(__name__)

RUN_STATE_KEY = RUN_STATE  # the key of the trainer's own state in a checkpoint
VERSION = CHECKPOINT_PARTS[RUN_STATE_KEY]

BEST_NAME = "dev-best.ckpt"
_NUMBERED = re.compile(r"states-(\d+)\.ckpt")


@dataclass
class Progress:
    """The progress of a run; it changes only when a step is complete."""

    step: int = 0  # completed steps, skipped ones included
    epoch: int = 0
    batch: int = 0  # batches of this epoch that all processes together have used
    batches: int = 0  # batches of an epoch
    tables: dict[str, str] = field(default_factory=dict)  # digest of each length table
    # SHA-256 of teachers' checkpoints and unit files, by config key
    sources: dict[str, str] = field(default_factory=dict)
    dev_tables: dict[str, str] = field(default_factory=dict)  # the same of those of `best_loss`
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # lowest dev loss
    best_step: int = 0  # and its step
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the fp16 loss scaler
    dev_due: bool = False  # the run ended before the dev loss of this step was measured
    # scalars since the last TensorBoard point
    records: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def state_dict(self, random: list[dict]) -> dict[str, Any]:
        """The progress and the random states of each process as plain data and tensors."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["records"] = {
            name: torch.stack([value.float().cpu() for value in values])
            for name, values in self.records.items()
        }
        return {"version": VERSION, "random": random, **data}

    @staticmethod
    def from_state_dict(data: Any, path: str) -> Progress:
        """Inverse of :meth:`state_dict`, for the checkpoint ``path``; ignores unknown keys.

        Raises CheckpointError if ``data`` is damaged or of a newer version.
        """
        try:
            check_format_version(data["version"], VERSION, f"{path} ({RUN_STATE_KEY})")
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']!r:.20}")
            # version 0.1 did not write these
            data = {"dev_due": False, "sources": {}, "dev_tables": {}, **data}
            values = {field.name: data[field.name] for field in dataclasses.fields(Progress)}
            counts = ("step", "epoch", "batch", "batches", "skipped", "skipped_in_a_row")
            if not all(type(values[name]) is int and values[name] >= 0 for name in counts):
                raise TypeError(f"expected whole numbers for {', '.join(counts)}")
            records = {name: list(points.unbind()) for name, points in values["records"].items()}
            values["records"] = defaultdict(list, records)
            for name in ("tables", "sources", "dev_tables", "scaler"):
                values[name] = dict(values[name])
            if not isinstance(data["random"], list):
                raise TypeError("random must be a list")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {RUN_STATE_KEY}: {error}") from None
        return Progress(**values)


class SaveError(SetupError):
    """A checkpoint could not be written."""


class CheckpointManager:
    """Write and prune the checkpoints in a run's folder.

    Args:
        folder: an existing folder.
        max_keep: how many numbered checkpoints to keep.
        hint: how to resume, for messages.
    """

    def __init__(self, folder: str | Path, max_keep: int, hint: str):
        self.folder = Path(folder)
        self.max_keep = max_keep
        self.hint = hint

    def save(self, states: Mapping, name: str) -> Path:
        """Save under a name, such as ``LAST_CHECKPOINT`` or ``BEST_NAME``; return the path.

        Raises SaveError if it cannot be written, as on a full disk. Earlier checkpoints stay.
        """
        path = self.folder / name
        with self._explain_errors(path):
            atomic_torch_save(dict(states), path)
        return path

    def save_numbered(self, states: Mapping, step: int) -> Path:
        """Save as ``states-STEP.ckpt`` and ``last.ckpt``; keep the newest ``max_keep``."""
        path, last = self.save(states, f"states-{step}.ckpt"), self.folder / LAST_CHECKPOINT
        with self._explain_errors(last):
            link_or_copy(path, last)
        names = (_NUMBERED.fullmatch(path.name) for path in self.folder.glob("states-*.ckpt"))
        # A file of a later step can only be a damaged one; see prune().
        numbered = sorted(number for name in names if name and (number := int(name[1])) <= step)
        for old in numbered[: -self.max_keep]:
            (self.folder / f"states-{old}.ckpt").unlink(missing_ok=True)
        return path

    def prune(self, step: int, keep_best: bool = True) -> None:
        """Prepare the folder for a run that resumes at ``step``.

        Remove incomplete files of a killed process. Rename checkpoints of later steps, because the
        next ``-a`` would resume from one of them. ``keep_best``: whether ``dev-best.ckpt`` of an
        earlier step is the best of this run.
        """
        remove_leftovers(self.folder, "*.ckpt")
        best = self.folder / BEST_NAME
        for path in (*run_checkpoints(self.folder), *([best] if best.is_file() else ())):
            try:
                newer = int(read_checkpoint(path)["Step"]) > step
            except NewerFormatError:
                raise
            except (CheckpointError, ValueError, TypeError):
                continue  # damaged: resuming ignores it, and a later save overwrites it
            if newer or (path == best and not keep_best):
                reason = "is from a later step" if newer else "has another dev loss"
                logger.warning("%s %s: renamed to %s.old", path, reason, path.name)
                path.replace(path.with_name(f"{path.name}.old"))

    @contextlib.contextmanager
    def _explain_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"cannot save {path}: {error.strerror}; earlier checkpoints are unchanged; free "
                f"some space, then {self.hint}"
            ) from None
