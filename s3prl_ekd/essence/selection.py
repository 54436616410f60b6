"""Selection of a teacher's posteriors, and the loss on the selected ones.

Essence Knowledge Distillation (Yang et al. 2019, arXiv 1906.10834) distils only the essential soft
outputs of an ensemble, as the rest may be noise (*paper*). The abstract does not give the
selection rule, so the three rules here are *ours*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class PosteriorSelection:
    """Selection rules; None disables a rule, and a class must pass all enabled rules."""

    top_k: int | None = None  # keep the most probable classes of each frame
    # keep the fewest most probable classes that together reach this probability; 1 keeps all
    mass: float | None = None
    confidence: float | None = None  # drop frames whose most probable class is less probable

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        # negated, as NaN fails every comparison
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass must be above 0 and at most 1, got {self.mass}")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")

    def __str__(self) -> str:
        enabled = (f"{name} {value}" for name, value in vars(self).items() if value is not None)
        return ", ".join(enabled) or "full posteriors"


class SelectedPosteriors(NamedTuple):
    """The result of :func:`select_posteriors`."""

    posteriors: Tensor  # [batch, frame, class]: 0 for dropped classes, each frame sums to 1
    keep: Tensor  # [batch, frame]: True for frames that are kept
    mass: Tensor  # [batch, frame]: probability of the kept classes before renormalisation


def select_posteriors(posteriors: Tensor, selection: PosteriorSelection) -> SelectedPosteriors:
    """Keep the essential classes of each frame and renormalise them to sum 1.

    Args:
        posteriors: ``[batch, frame, class]``, not negative. Padded frames may have any finite
            values; mask them in the loss.
        selection: the rules. Equally probable classes are ranked by index.
    """
    ranked, order = posteriors.sort(dim=-1, descending=True, stable=True)  # [batch, frame, class]
    mask = torch.ones_like(ranked, dtype=torch.bool)
    if selection.top_k is not None:
        mask[..., selection.top_k :] = False
    if selection.mass is not None and selection.mass < 1:
        # Keep a class if the classes ranked before it have not reached the mass. In float32,
        # rounding of the sums could keep one class too many or too few.
        probabilities = ranked.double()
        mask &= probabilities.cumsum(-1) - probabilities < selection.mass
    mask[..., 0] = True  # keep at least one class despite rounding
    mask = torch.zeros_like(mask).scatter(-1, order, mask)  # from rank order to class order
    selected = posteriors * mask
    mass = selected.sum(-1)  # [batch, frame]
    targets = selected / mass.clamp(min=torch.finfo(selected.dtype).tiny)[..., None]
    keep = torch.ones_like(mass, dtype=torch.bool)
    if selection.confidence is not None:
        keep = ranked[..., 0] >= selection.confidence
    return SelectedPosteriors(targets, keep, mass)


def soft_label_loss(log_probs: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy of the student against soft targets, averaged over the kept frames.

    It equals KL(targets || student) plus the entropy of the targets, which is constant, so its
    gradients are those of the KL divergence.

    Args:
        log_probs: the student's log-probabilities ``[batch, frame, class]``.
        targets: ``[batch, frame, class]``, each frame sums to 1.
        keep: ``[batch, frame]``, nonzero for kept frames. If no frame is kept the loss is 0.
    """
    mask = (targets > 0) & keep.bool()[..., None]
    # Fill before the product: a dropped class may have log 0, and 0 times -inf is NaN.
    terms = targets * log_probs.float().masked_fill(~mask, 0.0)
    count = keep.bool().sum().clamp(min=1)
    return -(terms.masked_fill(~mask, 0.0).sum() / count)
