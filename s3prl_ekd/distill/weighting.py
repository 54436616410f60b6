"""Weights of teachers over time, teacher dropping, and the dimensions in which teachers agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .losses import Comparison, LossWeights, frame_terms
from .settings import LossSettings, TeacherSettings


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


class TeacherDropping(nn.Module):
    """A weighting, in training only: each utterance learns from some of the teachers (UNIC).

    The loss is divided by all valid frames, those of dropped teachers too, so that a dropped
    utterance counts as no loss. Divided by what is left, an utterance would weigh more the more of
    its neighbours in the batch were dropped.

    Args:
        probability: see :func:`drop_teachers`.
        settings: of the loss whose size decides which teacher always stays.
    """

    def __init__(self, probability: float, settings: LossSettings):
        super().__init__()
        self.probability = probability
        self.settings = settings

    def forward(self, weights: LossWeights, compared: Comparison) -> LossWeights:
        if not self.training:
            return weights
        mask = compared.mask
        losses = {}  # teacher -> [batch]
        for name in compared.teachers:
            reconstruction, cosine = frame_terms(
                compared.predictions[name].detach(), compared.targets[name], self.settings
            )
            frames = (reconstruction + self.settings.cosine_weight * cosine).mean(1)
            losses[name] = (frames * mask).sum(1) / mask.sum(1).clamp(min=1)
        counted = mask if self.settings.mask_padding else torch.ones_like(mask)
        stays = drop_teachers(losses, self.probability)
        kept = {name: counted * utterances[:, None] for name, utterances in stays.items()}
        return replace(weights, frames={**weights.frames, **kept}, frame_count=counted.sum())


class Agreement(nn.Module):
    """A weighting: only the dimensions in which the teachers disagree least count.

    Args:
        keep: see :func:`agreeing_dims`.
    """

    def __init__(self, keep: float):
        super().__init__()
        self.keep = keep

    def forward(self, weights: LossWeights, compared: Comparison) -> LossWeights:
        agreeing = agreeing_dims(compared.teachers, self.keep)
        dims = {}
        for name, target in compared.targets.items():
            times = target.shape[-1] // agreeing.shape[-1]  # concat: once for each teacher
            dims[name] = agreeing.repeat(1, 1, 1, times)
            if name in weights.dims:
                dims[name] = dims[name] * weights.dims[name].to(agreeing)
        return replace(weights, dims=dims)


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
def agreeing_dims(teachers: Mapping[str, Tensor], keep: float) -> Tensor:
    """The dimensions in which the teachers disagree least, frame by frame (*ours*, in the spirit of
    Essence KD, arXiv 1906.10834: learn only from what the ensemble is sure of).

    Args:
        teachers: ``{teacher: [batch, layer, frame, dim]}``, all of one shape; at least two.
        keep: share of the dimensions that stay, at least one.

    Returns:
        ``[batch, layer, frame, dim]``, 1 where a dimension stays and 0 elsewhere.
    """
    spread = torch.stack(list(teachers.values())).float().var(0, unbiased=False)
    count = max(1, round(keep * spread.shape[-1]))
    kept = spread.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(spread).scatter(-1, kept, 1.0)
