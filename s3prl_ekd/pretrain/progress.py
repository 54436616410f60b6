"""Where a run stands, as its checkpoints keep it beside weights and optimizer."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.formats import CHECKPOINT_PARTS, RUN_STATE, refuse_newer

KEY = RUN_STATE  # in a checkpoint; all of the Runner's own state is under it
VERSION = CHECKPOINT_PARTS[KEY]


@dataclass
class Progress:
    """Counted at updates only: between two updates, within an accumulated batch, nothing is saved.

    ``step``: updates done, skipped ones included. ``epoch`` and ``batch``: the pass over the data,
    and how many batches of it are used, by all processes together. ``batches``: of one pass.
    ``tables``: digest of each corpus table. ``skipped``, ``skipped_in_a_row``: updates that were
    not finite. ``best_loss``, ``best_step``: of the dev tables. ``scaler``: the loss scale of fp16.
    ``records``: the scalars since TensorBoard's last point. ``dev_due``: the dev loss of this step
    is still to be measured: a signal came, or an error, before that was done.
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
    records: Mapping[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def packed(self, random: list[dict]) -> dict[str, Any]:
        """As plain data and tensors.

        Args:
            random: the random states of each process, by rank.
        """
        data = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        data["records"] = {
            name: torch.stack([value.float().cpu() for value in values])
            for name, values in self.records.items()
        }
        return {"version": VERSION, "random": random, **data}

    @staticmethod
    def unpacked(data: Any, where: str) -> Progress:
        """The inverse of :meth:`packed`; unknown keys are passed over.

        Raises:
            CheckpointError: naming ``where``; these are no such data.
        """
        try:
            refuse_newer(data["version"], VERSION, f"{where} ({KEY})")
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']!r:.20}")
            data = {"dev_due": False, **data}  # version 0.1 did not write it
            known = {each.name: data[each.name] for each in dataclasses.fields(Progress)}
            counts = ("step", "epoch", "batch", "batches", "skipped", "skipped_in_a_row")
            if not all(type(known[name]) is int and known[name] >= 0 for name in counts):
                raise TypeError("a count is no whole number")
            records = {name: list(values.unbind()) for name, values in known["records"].items()}
            known["records"] = defaultdict(list, records)
            known["tables"], known["scaler"] = dict(known["tables"]), dict(known["scaler"])
            if not isinstance(data["random"], list):
                raise TypeError("random is no list")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{where} is damaged: its run state ({KEY}): {error}") from None
        return Progress(**known)
