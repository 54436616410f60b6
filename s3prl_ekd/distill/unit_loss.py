"""Classification of units: hard labels in addition to the targets, as in Essence KD (1906.10834).

Essence KD's hard labels come from transcripts, which SSL pretraining does not have. Here they are
the k-means units of one teacher's layer (*ours*), predicted by a linear head on the student's last
hidden state.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TeacherError
from .losses import Comparison, Logs
from .teachers import TeacherEnsemble


class UnitLabels(Protocol):
    """Labels for the frames of one teacher's layer; ``width``: of the layer."""

    teacher: str
    layer: int

    @property
    def clusters(self) -> int:
        """Number of classes."""

    @property
    def width(self) -> int: ...

    def label(self, hidden: Tensor) -> Tensor:
        """``[batch, frame, dim]`` -> ``[batch, frame]``, integers from 0 to ``clusters - 1``."""


class UnitLoss(nn.Module):
    """A term: cross-entropy of the units of a teacher's layer.

    Raises:
        TeacherError: the units' teacher is not among the teachers, or has no such layer.
    """

    def __init__(self, units: UnitLabels, teachers: TeacherEnsemble, in_width: int, weight: float):
        super().__init__()
        if units.teacher not in teachers:
            raise TeacherError(
                f"unit_loss.file has units of teacher {units.teacher!r}; the config has: "
                f"{', '.join(teachers)}"
            )
        teacher = teachers[units.teacher]
        if units.layer > teacher.depth or units.width != teacher.width:
            raise TeacherError(
                f"unit_loss.file has units of layer {units.layer} with width {units.width}; "
                f"{units.teacher} has layers 0 to {teacher.depth} of width {teacher.width}"
            )
        self.units = units
        self.weight = weight
        self.head = nn.Linear(in_width, units.clusters)

    def forward(self, comparison: Comparison) -> tuple[Tensor, Logs]:
        """Mean cross-entropy over valid frames; logs their accuracy too."""
        labels = self.units.label(comparison.states[self.units.teacher][self.units.layer])
        logits = self.head(comparison.student.last).float()  # [batch, frame, unit]
        frames = min(logits.shape[1], labels.shape[1])
        mask = comparison.student.mask[:, :frames]
        logits, labels = logits[:, :frames], labels[:, :frames]
        errors = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        count = mask.sum().clamp(min=1)
        loss = (errors * mask).sum() / count
        correct = (logits.detach().argmax(-1) == labels) * mask  # [batch, frame]
        accuracy = correct.sum() / count
        return self.weight * loss, {"unit_accuracy": accuracy, "unit_loss": loss.detach()}
