"""One update of the weights from the gradients of one or more batches, as s3prl's Runner makes it,
and not made where it would not be finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..errors import EkdError
from .distributed import Processes

NAMED = 48  # utterances in a message


class NotFiniteError(EkdError):
    """Too many updates in a row were not finite; the message names the utterances."""


@dataclass(frozen=True)
class Update:
    """``loss`` of all its batches, the gradient's ``norm`` before clipping, and whether it was
    ``made``. ``scaling``: it was not made because fp16's scale is still too large, as is usual."""

    loss: float
    norm: float
    made: bool
    scaling: bool


class Updater:
    """Backward, accumulate, clip, step.

    Args:
        model: what is trained.
        optimizer: over its parameters.
        scheduler: its learning rate, or None.
        scaler: fp16's loss scale; disabled otherwise.
        clipping: largest norm of the gradient.
        accumulate: batches an update.
        processes: of the run; they agree on whether an update is made.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        scaler: torch.amp.GradScaler,
        clipping: float,
        accumulate: int,
        processes: Processes,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.clipping = clipping
        self.accumulate = accumulate
        self.processes = processes
        self.begin()

    def begin(self) -> None:
        """Forget the batches of the update before."""
        self.names: list[str] = []  # of the update's utterances, those of bad batches first
        self._losses: list[float] = []
        self._norm, self._finite = 0.0, False

    def backward(self, loss: Tensor, batch: Batch) -> bool:
        """Add the gradient of a batch; true when the update has all of its batches."""
        if self.accumulate > 1:
            loss = loss / self.accumulate
        self.scaler.scale(loss).backward()
        value = loss.item()  # waits for the device, as the norm below does
        self._losses.append(value)
        self.names = self.names + batch.names if math.isfinite(value) else batch.names + self.names
        return len(self._losses) == self.accumulate

    def clip(self) -> None:
        """Clip the gradient, and agree with all processes on whether loss and norm are finite.

        Weights and optimizer are as before, so that the step before this one can still be saved if
        another process is lost here.
        """
        self.scaler.unscale_(self.optimizer)
        self._norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping))
        finite = math.isfinite(sum(self._losses)) and math.isfinite(self._norm)
        self._finite = not self.processes.any(not finite)

    def update(self) -> Update:
        """Make the update after :meth:`clip`, unless loss or gradient is not finite; the schedule
        goes on anyway."""
        loss, norm, made = sum(self._losses), self._norm, self._finite
        if made or self.scaler.is_enabled():
            self._step(made)
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        scaling = not made and math.isfinite(loss) and self.scaler.is_enabled()
        return Update(loss, norm, made, scaling)

    def _step(self, made: bool) -> None:
        if made:
            self.scaler.step(self.optimizer)  # without a scale: optimizer.step()
        self.scaler.update()

    def rate(self) -> float:
        """The learning rate now."""
        if hasattr(self.optimizer, "get_lr"):  # s3prl's own: one for each parameter it has moved
            rates = self.optimizer.get_lr()
            if rates:
                return rates[0]
        return self.optimizer.param_groups[0]["lr"]


def not_finite(step: int, count: int, names: Sequence[str], hint: str) -> NotFiniteError:
    """The error for ``count`` updates in a row that were not finite."""
    shown = ", ".join(names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return NotFiniteError(
        f"loss or gradient was not finite in {count} updates in a row, up to step {step}; look at "
        f"the last batch ({shown}{more}), lower optimizer.lr, or raise runner.max_nonfinite; {hint}"
    )
