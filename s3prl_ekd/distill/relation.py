"""Temporal relations: similarities between the frames of an utterance, as a target that teachers of
any width and basis can share.

STaRHuBERT (Jang et al. 2023, arXiv 2312.09040) distils Gram matrices over frames: within a layer,
and between the input and the output of a layer. *Ours*: the mean of the matrices of several
teachers, weighted by ``teachers.NAME.weight``; similarities that do not depend on the scale of the
hidden states; windows that bound the memory.

Averaging hidden states needs teachers with a common basis. The matrices have none: a rotation of a
teacher's hidden states does not change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .aggregation import TeacherShape
from .frame_counts import divide, split_windows
from .losses import Comparison, Logs
from .settings import RelationSettings
from .student_settings import Architecture

# Ours: the smallest divisor of a centred frame, relative to the length of the frame itself. Shorter
# centred frames consist of rounding errors.
FLAT = 1e-3


class RelationLoss(nn.Module):
    """A term: mean squared difference between the student's and the teachers' similarities.

    The denominator is the number of pairs of frames in the same window that are valid and outside
    masked spans; target layers, and the matrices within and between them, have equal weights.

    Args:
        settings: kind of similarity, window, layers.
        teachers: the shapes of the teachers' targets.
        depths: teacher -> its number of layers.
        student: the student's settings.

    Raises:
        ConfigError: the student lacks one of the layers or skips some at random, or
            ``between_layers`` has no two different layers of the student to compare.
    """

    def __init__(
        self,
        settings: RelationSettings,
        teachers: Mapping[str, TeacherShape],
        depths: Mapping[str, int],
        student: Architecture,
    ):
        super().__init__()
        self.settings = settings
        chosen = settings.student_layers
        self.layers = chosen or same_depths(teachers, depths, student.encoder_layers)
        try:  # for a copy of a teacher and a student of a file, whose sizes the config lacks
            settings.check_student(student.encoder_layers, student.encoder_layerdrop)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        repeated = any(a == b for a, b in pairwise(self.layers))
        if settings.between_layers and (len(self.layers) < 2 or repeated):
            raise ConfigError(
                "relation.between_layers compares the frames of consecutive targets, which need a "
                f"layer of the student each, but the student's layers are {[*self.layers]}; name "
                "others in relation.student_layers (0 to "
                f"{student.encoder_layers}), or set between_layers: false"
            )

    def forward(self, comparison: Comparison) -> tuple[Tensor, Logs]:
        """The weighted term, and ``relation`` for the log, without the weight."""
        mask = comparison.mask  # [batch, frame]
        student = torch.stack([comparison.student.hidden_states[i] for i in self.layers], dim=1)
        with torch.autocast(mask.device.type, enabled=False):  # Gram matrices in float32
            target: list[Tensor] = []
            total = sum(comparison.teacher_weights[name] for name in comparison.raw_teachers)
            for name, states in comparison.raw_teachers.items():
                weight = comparison.teacher_weights[name] / total
                grams = [weight * gram for gram in self.grams(states, mask)]
                target = [a + b for a, b in zip(target, grams, strict=True)] if target else grams
            predicted = self.grams(student[:, :, : mask.shape[1]], mask)
            window = split_windows(mask[..., None].float(), self.settings.window)
            valid = (window @ window.transpose(-1, -2))[:, None]  # [batch, 1, window, frame, frame]
            count = comparison.counts.pairs if comparison.counts else valid.sum()
            losses = [
                divide(((a - b).square() * valid).sum(), count) / a.shape[1]
                for a, b in zip(predicted, target, strict=True)
            ]
            loss = torch.stack(losses).mean()
        return self.settings.weight * loss, {"relation": loss.detach()}

    def grams(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """Similarities of frames within each layer and, with ``between_layers``, between each layer
        and the next: ``[batch, layer, frame, dim]`` -> ``[batch, layer, window, frame, frame]``."""
        windows = unit_frames(states, mask, self.settings)
        grams = [windows @ windows.transpose(-1, -2)]
        if self.settings.between_layers:
            grams.append(windows[:, :-1] @ windows[:, 1:].transpose(-1, -2))
        return grams


def unit_frames(states: Tensor, mask: Tensor, settings: RelationSettings) -> Tensor:
    """Frames of unit length in windows: ``[batch, layer, window, frame, dim]``.

    A centred frame is divided by its length, but by no less than ``FLAT`` times the length of
    the frame before the mean is subtracted: what is shorter consists of rounding errors, and unit
    length would give huge gradients.

    Args:
        states: ``[batch, layer, frame, dim]``.
        mask: ``[batch, frame]``; frames with 0 count neither in the mean of ``centred`` nor later.
    """
    valid = split_windows(mask[:, None, :, None].float(), settings.window)
    windows = split_windows(states.float(), settings.window)
    if settings.similarity == "cosine":
        return F.normalize(windows, dim=-1)
    mean = (windows * valid).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True).clamp(min=1)
    least = (FLAT * windows.detach().norm(dim=-1, keepdim=True)).clamp(min=1e-12)
    centred = windows - mean
    return centred / torch.maximum(centred.norm(dim=-1, keepdim=True), least)


def same_depths(
    teachers: Mapping[str, TeacherShape], depths: Mapping[str, int], student_depth: int
) -> Sequence[int]:
    """The student's layer for each target: the one at the same relative depth, rounded, and at
    least 1 unless the target is layer 0.

    The depth of a target is the mean over its layers and over teachers.
    """
    layers = []
    for targets in zip(*(shape.targets for shape in teachers.values()), strict=True):
        places = [
            sum(target) / len(target) / depths[name]
            for name, target in zip(teachers, targets, strict=True)
        ]
        place = sum(places) / len(places)
        layers.append(max(int(place > 0), round(place * student_depth)))
    return layers
