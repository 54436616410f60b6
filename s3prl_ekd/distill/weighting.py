"""Who is listened to: teacher weights over time, teachers dropped, dimensions left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .settings import TeacherSettings


def weights_at(
    teachers: Mapping[str, TeacherSettings], step: int, weight_steps: int
) -> dict[str, float]:
    """Each teacher's weight at a step (counted from 1): a straight line from ``weight`` to
    ``final_weight``, reached after ``weight_steps`` steps (*ours*)."""
    done = min(1.0, max(0, step - 1) / weight_steps) if weight_steps else 0.0
    weights = {}
    for name, teacher in teachers.items():
        last = teacher.weight if teacher.final_weight is None else teacher.final_weight
        weights[name] = teacher.weight + done * (last - teacher.weight)
    return weights


@torch.no_grad()
def drop_teachers(
    losses: Mapping[str, Tensor], probability: float, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Teacher dropping (UNIC): which teacher each utterance learns from.

    The teacher of the highest loss always stays, so that the hardest is not forgotten; each other
    one is dropped with ``probability``.

    Args:
        losses: ``{teacher: [batch]}``, the loss of each utterance.
        probability: 0 to 1; UNIC uses 0.5.
        generator: of the random numbers; None: torch's own, on the CPU.

    Returns:
        ``{teacher: [batch]}``, 1 where it stays and 0 where it is dropped.
    """
    stacked = torch.stack(list(losses.values()))  # [teacher, batch]
    stays = torch.rand(stacked.shape, generator=generator) >= probability
    hardest = stacked.argmax(0, keepdim=True)
    stays = stays.to(stacked.device).scatter(0, hardest, True)
    return dict(zip(losses, stays.to(stacked.dtype), strict=True))


@torch.no_grad()
def agreeing_dims(hidden: Mapping[str, Tensor], keep: float) -> Tensor:
    """The dimensions in which the teachers disagree least, frame by frame (*ours*, in the spirit of
    Essence KD, arXiv 1906.10834: learn only from what the ensemble is sure of).

    Args:
        hidden: ``{teacher: [batch, layer, frame, dim]}``, all of one shape; at least two.
        keep: share of the dimensions that stay, at least one.

    Returns:
        ``[batch, layer, frame, dim]``, 1 where a dimension stays and 0 elsewhere.
    """
    spread = torch.stack(list(hidden.values())).float().var(0, unbiased=False)
    count = max(1, round(keep * spread.shape[-1]))
    kept = spread.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(spread).scatter(-1, kept, 1.0)
