"""Classification of units: hard labels in addition to the targets, as in Essence KD (1906.10834).

Essence KD's hard labels come from transcripts, which SSL pretraining does not have. Here they are
k-means units of teachers' layers, predicted by linear heads on the student's last hidden state.
With masked spans this is HuBERT's masked prediction (Hsu et al. 2021, arXiv 2106.07447) of the
units of a trained teacher, as in DiceHuBERT (arXiv 2507.02911). *Ours*: units of several teachers,
a head for each; and a linear layer with softmax, where HuBERT has cosines with learned embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TeacherError
from .frame_counts import divide
from .losses import Comparison, Logs
from .settings import UnitLossSettings
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

    Denominators: the number of masked frames, or of all valid frames if none are masked; for
    ``unmasked_weight``, the number of the other frames.

    Args:
        units: the labels.
        head: predicts them from the student's last hidden state.
        settings: weights.
        masked: whether spans of the student's input are masked (``student.mask``).
        name: first part of the names of the scalars in the log.
    """

    def __init__(
        self,
        units: UnitLabels,
        head: nn.Linear,
        settings: UnitLossSettings,
        masked: bool,
        name: str,
    ):
        super().__init__()
        self.units, self.head, self.settings = units, head, settings
        self.masked, self.name = masked, name

    def forward(self, comparison: Comparison) -> tuple[Tensor, Logs]:
        """The weighted term; logs the cross-entropy and the accuracy, without weights."""
        labels = self.units.label(comparison.states[self.units.teacher][self.units.layer])
        frames = comparison.valid.shape[1]
        logits = self.head(comparison.student.last[:, :frames]).float()  # [batch, frame, unit]
        labels = labels[:, :frames]
        errors = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        correct = (logits.detach().argmax(-1) == labels).float()  # [batch, frame]
        counts, outside = comparison.counts, comparison.mask
        # 1 in masked spans, or in all valid frames if none are masked
        inside = comparison.valid - outside if self.masked else comparison.valid
        count: Tensor | float = inside.sum()
        if counts:
            count = counts.masked if self.masked else counts.valid
        loss, accuracy = mean(errors, inside, count), mean(correct, inside, count)
        logs = {f"{self.name}_loss": loss.detach(), f"{self.name}_accuracy": accuracy}
        total = self.settings.weight * loss
        if self.settings.unmasked_weight:
            count = counts.frames if counts else outside.sum()
            loss = mean(errors, outside, count)
            logs[f"{self.name}_loss_unmasked"] = loss.detach()
            logs[f"{self.name}_accuracy_unmasked"] = mean(correct, outside, count)
            total = total + self.settings.unmasked_weight * loss
        return total, logs


def mean(values: Tensor, mask: Tensor, count: Tensor | float) -> Tensor:
    """The sum of ``values [batch, frame]`` over the frames of a mask, divided by ``count``."""
    return divide((values * mask).sum(), count)


def unit_names(units: Sequence[UnitLabels]) -> list[str]:
    """A name for each, the key of its head in checkpoints: ``hubert_layer9``, and
    ``hubert_layer9_2`` for the second of this layer."""
    names: list[str] = []
    for labels in units:
        first = f"{labels.teacher}_layer{labels.layer}"
        later = (f"{first}_{n}" for n in itertools.count(2))
        names.append(next(name for name in itertools.chain([first], later) if name not in names))
    return names


def check_units(units: UnitLabels, teachers: TeacherEnsemble, where: str) -> None:
    """Check that units are of a teacher's layer.

    Raises:
        TeacherError: the units' teacher is not among the teachers, or has no such layer.
    """
    if units.teacher not in teachers:
        raise TeacherError(
            f"{where}.file has units of teacher {units.teacher!r}; the config has: "
            f"{', '.join(teachers)}"
        )
    teacher = teachers[units.teacher]
    if units.layer > teacher.depth or units.width != teacher.width:
        raise TeacherError(
            f"{where}.file has units of layer {units.layer} with width {units.width}; "
            f"{units.teacher} has layers 0 to {teacher.depth} of width {teacher.width}"
        )
