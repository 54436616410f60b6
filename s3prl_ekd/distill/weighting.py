"""Teacher weight schedules, teacher dropping, and selection of dimensions by agreement."""

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
    """Teacher -> its weight at a step (counted from 1): linear from ``weight`` to ``final_weight``,
    which is reached after ``weight_steps`` steps (*ours*)."""
    progress = min(1.0, max(0, step - 1) / weight_steps) if weight_steps else 0.0
    weights = {}
    for name, teacher in teachers.items():
        last = teacher.weight if teacher.final_weight is None else teacher.final_weight
        weights[name] = teacher.weight + progress * (last - teacher.weight)
    return weights


class TeacherDropping(nn.Module):
    """A weighting: teacher dropping in training, after UNIC (arXiv 2408.05088).

    The loss is divided by the number of all valid frames, dropped ones included (*ours*). If it
    were divided by the remaining frames, the weight of an utterance would depend on how many other
    utterances of the batch were dropped. With n teachers and probability p, on average
    (1 + (n - 1)(1 - p)) / n of the frames are kept; the log has this share of each batch. At equal
    weights of the teachers the loss shrinks to about this share, and to a little more because the
    teacher with the highest loss is kept.
    """

    def __init__(self, probability: float, settings: LossSettings):
        super().__init__()
        self.probability = probability
        self.settings = settings

    def forward(self, weights: LossWeights, comparison: Comparison) -> LossWeights:
        if not self.training:
            return weights
        mask = comparison.mask
        losses = {}  # teacher -> [batch]; one of weight 0 must not be the one that is kept
        for name in comparison.teachers:
            if comparison.teacher_weights[name] == 0:
                continue
            reconstruction, cosine = frame_terms(
                comparison.predictions[name].detach(), comparison.targets[name], self.settings
            )
            frames = (reconstruction + self.settings.cosine_weight * cosine).mean(1)
            losses[name] = (frames * mask).sum(1) / mask.sum(1).clamp(min=1)
        counted = weights.frames[next(iter(comparison.teachers))]
        counted = torch.ones_like(mask) if counted is None else counted
        selected = drop_teachers(losses, self.probability)  # teacher -> [batch]
        remaining = {name: counted * flags[:, None] for name, flags in selected.items()}
        count = counted.sum() if weights.frame_count is None else weights.frame_count
        kept = torch.stack(list(selected.values())).mean()
        return replace(
            weights,
            frames={**weights.frames, **remaining},
            frame_count=count,
            logs={**weights.logs, "teachers_kept": kept},
        )


class Agreement(nn.Module):
    """A weighting: only the dimensions in which the teachers differ least are in the loss."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, weights: LossWeights, comparison: Comparison) -> LossWeights:
        agreeing = agreeing_dims(comparison.teachers, self.share)
        dims = {}
        for name, target in comparison.targets.items():
            times = target.shape[-1] // agreeing.shape[-1]  # concat: the number of teachers
            dims[name] = agreeing.repeat(1, 1, 1, times)
            if name in weights.dims:
                dims[name] = dims[name] * weights.dims[name].to(agreeing)
        return replace(weights, dims=dims)


@torch.no_grad()
def drop_teachers(losses: Mapping[str, Tensor], probability: float) -> dict[str, Tensor]:
    """Draw the teachers of each utterance: teacher dropping (UNIC, arXiv 2408.05088).

    The teacher with the highest loss is kept; each of the others is dropped with ``probability``.

    Args:
        losses: ``{teacher: [batch]}``, the loss of each utterance.
        probability: 0 to 1; UNIC uses 0.5.

    Returns:
        ``{teacher: [batch]}``, 1 where the teacher is kept and 0 where it is dropped.
    """
    stacked = torch.stack(list(losses.values()))  # [teacher, batch]
    selected = torch.rand(stacked.shape) >= probability  # drawn on the CPU
    hardest = stacked.argmax(0, keepdim=True)
    selected = selected.to(stacked.device, non_blocking=True).scatter(0, hardest, True)
    return dict(zip(losses, selected.to(stacked.dtype), strict=True))


@torch.no_grad()
def agreeing_dims(teachers: Mapping[str, Tensor], share: float) -> Tensor:
    """Select the dimensions in which the teachers differ least, frame by frame (*ours*, after
    Essence KD, arXiv 1906.10834, which selects the soft outputs of high confidence).

    Args:
        teachers: ``{teacher: [batch, layer, frame, dim]}``, all of one shape; at least two.
        share: share of the dimensions to select; at least one is.

    Returns:
        ``[batch, layer, frame, dim]``, 1 where a dimension is selected and 0 elsewhere.
    """
    spread = torch.stack(list(teachers.values())).float().var(0, unbiased=False)
    count = max(1, round(share * spread.shape[-1]))
    selected = spread.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(spread).scatter(-1, selected, 1.0)
