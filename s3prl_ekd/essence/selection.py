"""Which of a teacher's soft outputs are distilled, and the loss on those that are.

Essence Knowledge Distillation (Yang et al. 2019, arXiv 1906.10834) distils not all soft outputs of
an ensemble but the essential ones; the rest may be noise (*paper*). The rule by which it selects is
not in its abstract, so the three rules here are *ours*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TeacherError


@dataclass(frozen=True)
class Selection:
    """The rules; one that is None does nothing, and a class must pass all that are set.

    Attributes:
        top_k: keep the ``top_k`` most probable classes of each frame.
        mass: keep the fewest most probable classes of a frame that together reach this
            probability; above 0, and 1 keeps all.
        confidence: leave out frames whose most probable class is below this probability.

    Raises:
        ValueError: a value that is not allowed.
    """

    top_k: int | None = None
    mass: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; 1 or more is allowed")
        # `not` around: NaN fails every comparison
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass is {self.mass}; above 0 and up to 1 is allowed")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence is {self.confidence}; 0 to 1 is allowed")

    def __str__(self) -> str:
        rules = {"top_k": self.top_k, "mass": self.mass, "confidence": self.confidence}
        named = [f"{name} {value}" for name, value in rules.items() if value is not None]
        return ", ".join(named) or "full posteriors"


class Selected(NamedTuple):
    """``posteriors`` ``[batch, frame, class]``, 0 where a class was dropped, each frame's sum 1;
    ``keep`` ``[batch, frame]``, True where a frame counts; ``mass`` ``[batch, frame]``, the
    probability that the kept classes had before they were scaled up."""

    posteriors: Tensor
    keep: Tensor
    mass: Tensor


def select(posteriors: Tensor, selection: Selection) -> Selected:
    """Keep the essential outputs of each frame and scale them so that they sum to 1.

    Args:
        posteriors: ``[batch, frame, class]``, not negative. Frames of padding may hold anything
            finite; mask them where the loss is taken.
        selection: the rules. Among equally probable classes the one of the lower index goes first.
    """
    ranked, order = posteriors.sort(dim=-1, descending=True, stable=True)  # [batch, frame, class]
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if selection.top_k is not None:
        kept[..., selection.top_k :] = False
    if selection.mass is not None and selection.mass < 1:
        # A class stays while those before it have not reached the mass. In float64: 0.95 of many
        # small float32 numbers would be reached a class too early or too late.
        wide = ranked.double()
        before = wide.cumsum(-1) - wide
        kept &= before < selection.mass
    kept[..., 0] = True  # at least one class a frame, whatever rounding does
    kept = torch.zeros_like(kept).scatter(-1, order, kept)  # from ranks back to classes
    chosen = posteriors * kept
    mass = chosen.sum(-1)  # [batch, frame]
    targets = chosen / mass.clamp(min=torch.finfo(chosen.dtype).tiny)[..., None]
    keep = torch.ones_like(mass, dtype=torch.bool)
    if selection.confidence is not None:
        keep = ranked[..., 0] >= selection.confidence
    return Selected(targets, keep, mass)


def soft_label_loss(log_probs: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy of the student against soft targets, the mean over the frames that count.

    It is KL(targets || student) plus the entropy of the targets, which no student changes: the
    gradients are those of the KL divergence.

    Args:
        log_probs: the student's log-probabilities ``[batch, frame, class]``.
        targets: ``[batch, frame, class]``, each frame's sum 1.
        keep: ``[batch, frame]``, nonzero where a frame counts. With no such frame the loss is 0.

    Raises:
        TeacherError: the shapes do not match.
    """
    if log_probs.shape != targets.shape or keep.shape != targets.shape[:2]:
        raise TeacherError(
            f"log-probabilities of shape {list(log_probs.shape)}, targets of shape "
            f"{list(targets.shape)} and a mask of shape {list(keep.shape)} do not belong together"
        )
    wanted = (targets > 0) & keep.bool()[..., None]
    # `where` before the product: a dropped class may be at log 0, and 0 times -inf is no number
    terms = targets * log_probs.float().masked_fill(~wanted, 0.0)
    count = keep.bool().sum().clamp(min=1)
    return -(terms.masked_fill(~wanted, 0.0).sum() / count)
