"""Optimizer, schedule, precision, and one update of the weights.

An update is as s3prl's Runner makes it, and skipped where it would not be finite. ``FusedAdamW`` is
torch's fused AdamW beside s3prl's optimizers: one kernel for all weights, and no wait for the
device. s3prl's ``AdamW_with_schedule`` takes two norms of each weight at each step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..data.batches import Batch
from ..errors import EkdError, SetupError
from .distributed import Processes
from .resume import resume_optimizer, resume_scheduler
from .settings import FUSED_ADAMW, RunSettings

logger = logging.getLogger(__name__)


def halves(run: RunSettings, device: str) -> bool:
    """Whether float16 and a loss scale are used: ``fp16``, on a CUDA device."""
    return run.fp16 and device.startswith("cuda")


def autocast(run: RunSettings, device: str) -> torch.autocast:
    """The context of the student's forward: float16, bfloat16, or nothing.

    On a CPU it is nothing: bfloat16 is slower there than float32, and some (virtual) processors
    claim instructions for it that they do not have.
    """
    on_cuda = device.startswith("cuda")
    for name in ("fp16", "bf16"):
        if getattr(run, name) and not on_cuda:
            logger.warning("runner.%s needs a CUDA device: training in float32", name)
    dtype = torch.bfloat16 if run.bf16 else torch.float16
    return torch.autocast("cuda", dtype, enabled=on_cuda and (run.bf16 or run.fp16))


def fused_adamw(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.AdamW:
    """The optimizer of ``optimizer: {name: FusedAdamW, ...}``, over what is trained.

    Weight decay is as written (default: 0.01), and 0 for biases and the weights of normalisations,
    which have one dimension.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [w for w in trained if w.dim() > 1],
            "weight_decay": config.get("weight_decay", 0.01),
        },
        {"params": [w for w in trained if w.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=float(config["lr"]),
        betas=tuple(config.get("betas", (0.9, 0.999))),
        eps=float(config.get("eps", 1e-6)),
        fused=True,
    )


def warmup_schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], total_steps: int
) -> LambdaLR:
    """A straight line up over ``warmup_proportion`` of the steps (default: 0.07, as s3prl's), then
    one down to 0 after the last."""
    return LambdaLR(
        optimizer, _rate(config.get("warmup_proportion", 0.07) * total_steps, total_steps)
    )


def _rate(warmup: float, total: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        up = (step + 1) / warmup if warmup > 0 else 1.0
        down = (total - step) / (total - warmup) if total > warmup else 1.0
        return max(0.0, min(1.0, up, down))

    return rate


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


def make_updater(runner: Any, states: Mapping) -> Updater:
    """What makes the updates of a run.

    Args:
        runner: our Runner; s3prl's part of it makes s3prl's optimizers and schedules.
        states: the checkpoint to go on from; empty for a new run.

    Raises:
        CheckpointError: the checkpoint's optimizer does not fit.
        SetupError: torch refuses the optimizer's settings.
    """
    run, config, place = runner.settings, runner.config, runner.progress
    model = runner.upstream.model
    ours = config["optimizer"]["name"] == FUSED_ADAMW
    scaler = torch.amp.GradScaler("cuda", enabled=halves(run, runner.device))
    if place.scaler:
        scaler.load_state_dict(place.scaler)
    try:
        if ours:
            optimizer = fused_adamw(model, config["optimizer"])
        else:
            optimizer = runner._get_optimizer([model])
    except (TypeError, ValueError, AttributeError) as error:
        raise SetupError(f"optimizer {config['optimizer']} cannot be made: {error}") from None
    if states:
        resume_optimizer(optimizer, states, runner.args.init_ckpt)
    scheduler = None
    if config.get("scheduler"):
        scheduler = runner._get_scheduler(optimizer)
    elif ours:
        scheduler = warmup_schedule(optimizer, config["optimizer"], run.total_steps)
    if states and scheduler is not None:
        resume_scheduler(scheduler, optimizer, place.step)
    clipping, each = run.gradient_clipping, run.gradient_accumulate_steps
    return Updater(model, optimizer, scheduler, scaler, clipping, each, runner.processes)
