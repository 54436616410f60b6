"""Optimizer, learning rate schedule, precision, and the update of the weights.

The update is that of s3prl's Runner, but a step whose loss or gradient is not finite is skipped.
``FusedAdamW``, an addition to s3prl's optimizers, is torch's fused AdamW: one kernel for all
weights, no synchronisation with the device. (s3prl's ``AdamW_with_schedule`` computes two norms of
each weight at each step.)
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..data.batch import Batch
from ..distill.student_settings import PruningSettings
from ..errors import EkdError
from ..system.precision import DTYPES
from .distributed import ProcessGroup
from .settings import FUSED_ADAMW, RunSettings

logger = logging.getLogger(__name__)

MAX_NAMES = 48  # utterances in a message


def autocast(precision: str, device: str) -> torch.autocast:
    """The autocast context of the student's forward; disabled for float32 and TF32."""
    dtype = DTYPES.get(precision)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def fused_adamw(
    model: nn.Module, config: Mapping[str, Any], pruning: PruningSettings | None = None
) -> torch.optim.AdamW:
    """Make the optimizer of ``optimizer: {name: FusedAdamW, ...}``.

    Weight decay is ``weight_decay`` (default: 0.01), and 0 for one-dimensional parameters: biases
    and the weights of normalisation layers. With pruning, gates and Lagrange multipliers have a
    learning rate of their own; the multipliers are maximised.
    """
    children = dict(model.named_children())
    gates: list[nn.Parameter] = []
    multipliers: list[nn.Parameter] = []
    if "multipliers" in children:
        from ..distill.pruning.gates import Gate

        multipliers = [*children["multipliers"].parameters()]
        gates = [w for m in model.modules() if isinstance(m, Gate) for w in m.parameters()]
    own = {id(weight) for weight in (*gates, *multipliers)}
    trained = [w for w in model.parameters() if w.requires_grad and id(w) not in own]
    decay = config.get("weight_decay", 0.01)
    groups: list[dict[str, Any]] = [
        {"params": [w for w in trained if w.dim() > 1], "weight_decay": decay},
        {"params": [w for w in trained if w.dim() <= 1], "weight_decay": 0.0},
    ]
    if pruning is not None:
        fixed: dict[str, Any] = {"lr": pruning.lr, "weight_decay": 0.0}
        groups += [{"params": gates, **fixed}, {"params": multipliers, "maximize": True, **fixed}]
    return torch.optim.AdamW(
        groups,
        lr=float(config["lr"]),
        betas=tuple(config.get("betas", (0.9, 0.999))),
        eps=float(config.get("eps", 1e-6)),
        fused=True,
    )


def warmup_rate(config: Mapping[str, Any], total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by the number of steps so far: linear warm-up over
    ``warmup_proportion`` of the steps (default: 0.07, as in s3prl), then linear decay, which
    reaches 0 after the last step."""
    warmup = config.get("warmup_proportion", 0.07) * total_steps

    def rate(step: int) -> float:
        up = (step + 1) / warmup if warmup > 0 else 1.0
        down = (total_steps - step) / (total_steps - warmup) if total_steps > warmup else 1.0
        return max(0.0, min(1.0, up, down))

    return rate


def warmup_schedule(
    optimizer: torch.optim.Optimizer, config: Mapping[str, Any], total_steps: int
) -> LambdaLR:
    """The schedule of :func:`warmup_rate`."""
    return LambdaLR(optimizer, warmup_rate(config, total_steps))


def add_to_s3prl() -> None:
    """Make FusedAdamW known to s3prl's own Runner, whose ``get_optimizer`` looks up functions.

    The learning rate follows from the number of steps in the optimizer's state, because this Runner
    makes and saves schedules of s3prl only.
    """

    def get_fused_adamw(
        models: Sequence[nn.ModuleDict], total_steps: int, **config: Any
    ) -> torch.optim.AdamW:
        optimizer = fused_adamw(models[0], config)
        rate = warmup_rate(config, total_steps)

        def set_rate(*_: Any) -> None:
            steps = max((int(s["step"]) for s in optimizer.state.values()), default=0)
            for group in optimizer.param_groups:
                group["lr"] = float(config["lr"]) * rate(steps)

        optimizer.register_step_pre_hook(set_rate)
        return optimizer

    module = sys.modules.get("optimizers")  # of s3prl
    if module is not None:
        setattr(module, f"get_{FUSED_ADAMW}", get_fused_adamw)


class NotFiniteError(EkdError):
    """Too many steps in a row were not finite; the message names the utterances."""


@dataclass(frozen=True)
class UnreadStep:
    """Loss and norm of a step, still on the device; :func:`read_steps` waits for them."""

    values: Tensor  # loss of each batch, norm of the gradient before clipping, 1 if applied else 0
    names: Sequence[Sequence[str]]  # utterances of each batch
    scaled: bool  # whether the loss was scaled, for float16


@dataclass(frozen=True)
class StepResult:
    """The result of a step."""

    loss: float  # sum over the step's batches
    norm: float  # of the gradient, before clipping
    applied: bool  # whether the weights were updated: not if loss or gradient is not finite
    lowers_scale: bool  # not updated because float16's loss scale is too large, which is normal
    names: list[str]  # utterances; those of batches whose loss is not finite come first


def read_steps(steps: Sequence[UnreadStep]) -> list[StepResult]:
    """Copy the values of steps from the device, all at once."""
    results = []
    for step, row in zip(steps, torch.stack([s.values for s in steps]).tolist(), strict=True):
        *losses, norm, applied = row
        loss = 0.0
        for value in losses:  # not sum(), which rounds otherwise from Python 3.12 on
            loss += value
        batches = sorted(zip(losses, step.names, strict=True), key=lambda b: math.isfinite(b[0]))
        names = [name for _, batch in batches for name in batch]
        lowers_scale = not applied and step.scaled and math.isfinite(loss)
        results.append(StepResult(loss, norm, bool(applied), lowers_scale, names))
    return results


class OptimizerStep:
    """Backward, accumulation, clipping and update, without waiting for the device.

    A step whose loss or gradient is not finite leaves weights and optimizer unchanged. torch's
    fused optimizers find this on the device, others wait for it. ``model`` has the trained modules,
    ``scaler`` is disabled except for float16. Either all processes apply an update or none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR | None,
        scaler: torch.amp.GradScaler,
        run: RunSettings,
        processes: ProcessGroup,
    ):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.scaler, self.run, self.processes = scaler, run, processes
        self.begin()

    def begin(self) -> None:
        """Begin a step; the gradients are zero already."""
        self._losses: list[Tensor] = []
        self._names: list[Sequence[str]] = []

    def backward(self, loss: Tensor, batch: Batch) -> None:
        """Accumulate the gradient of a batch."""
        loss = loss / self.run.gradient_accumulate_steps
        self.scaler.scale(loss).backward()
        self._losses.append(loss.detach())
        self._names.append(batch.names)

    def clip(self) -> None:
        """Clip the gradient; check with all processes whether loss and norm are finite.

        Weights and optimizer do not change, so that the previous step can still be saved if another
        process is lost here.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.gradient_clipping)
        values = torch.stack([*self._losses, norm])
        finite = self.processes.minimum(values.isfinite().all().to(values.dtype))
        self._values = torch.cat([values, finite[None]])

    def update(self) -> UnreadStep:
        """Update weights and learning rate; keep the weights if loss or norm is not finite."""
        finite = self._values[-1]
        # GradScaler, too, gives torch's fused optimizers the flag in this attribute.
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = 1 - finite  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.scaler.step(self.optimizer)  # optimizer.step() if the scaler is disabled
        self.scaler.update()  # does nothing if it is disabled
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        return UnreadStep(self._values, self._names, self.scaler.is_enabled())

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        # s3prl's optimizers give one for each updated parameter.
        rates = self.optimizer.get_lr() if hasattr(self.optimizer, "get_lr") else []
        return rates[0] if rates else self.optimizer.param_groups[0]["lr"]


def not_finite_error(step: int, count: int, names: Sequence[str], hint: str) -> NotFiniteError:
    """The error for ``count`` steps in a row that were not finite."""
    listed = ", ".join(names[:MAX_NAMES])
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return NotFiniteError(
        f"loss or gradient was not finite in {count} steps in a row, up to step {step}; check the "
        f"utterances of that step ({listed}{more}), lower optimizer.lr, or raise "
        f"runner.max_nonfinite; {hint}"
    )
