"""The whole method in one module: teachers, aggregation, student, heads, loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import AGGREGATIONS
from .heads import PredictionHeads
from .losses import distillation_loss, distillation_terms
from .settings import Aggregation, LossSettings
from .student import Student
from .teachers import TeacherEnsemble


class EnsembleDistiller(nn.Module):
    """Ensemble knowledge distillation (Huang et al. 2023, arXiv 2302.12757).

    Args:
        teachers: the frozen teachers.
        student: the student's backbone.
        aggregation: ``separate``, ``average`` or ``concat``.
        loss: weights and masking of the loss.

    Raises:
        TeacherError: the teachers cannot be aggregated this way, or have another frame rate.
    """

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: Student,
        aggregation: Aggregation,
        loss: LossSettings,
    ):
        super().__init__()
        for name, teacher in teachers.items():
            if teacher.stride != student.settings.stride:
                raise TeacherError(
                    f"teachers.{name} gives a frame every {teacher.stride} samples and the student "
                    f"every {student.settings.stride}; use one frame rate"
                )
        self.teachers = teachers
        self.aggregate = AGGREGATIONS[aggregation](teachers.shapes)
        self.loss_settings = loss
        # What is trained, apart from what is not: an optimizer over `trainable` sees no teacher.
        self.trainable = nn.ModuleDict(
            {"student": student, "heads": PredictionHeads(student.width, self.aggregate.specs)}
        )

    @property
    def student(self) -> Student:
        return self.trainable["student"]

    @property
    def heads(self) -> PredictionHeads:
        return self.trainable["heads"]

    def forward(
        self, waves: Tensor, lengths: Tensor, detail: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of distillation.

        Args:
            waves: ``[batch, sample]`` at 16 kHz, zero-padded at the end.
            lengths: ``[batch]`` valid samples.
            detail: also give the terms of every teacher and layer.

        Returns:
            The scalar loss, and scalars by name for the log.
        """
        unpadded = [wave[:length] for wave, length in zip(waves, lengths.tolist(), strict=True)]
        hidden = self.teachers(unpadded)  # {teacher: [batch, layer, frame, dim]}
        out = self.student(waves, lengths)
        predictions = self.heads(out.last)  # {target set: [batch, layer, frame, width]}

        frames = min(out.last.shape[1], *(states.shape[2] for states in hidden.values()))
        hidden = {name: states[:, :, :frames] for name, states in hidden.items()}
        predictions = {name: states[:, :, :frames] for name, states in predictions.items()}
        mask = out.mask[:, :frames] if self.loss_settings.mask_padding else None

        targets = self.aggregate.targets(hidden)
        loss, parts = distillation_loss(
            predictions, targets, mask, self.loss_settings.cosine_weight
        )
        if self.loss_settings.feature_penalty:
            penalty = out.features.float().pow(2).mean()
            loss = loss + self.loss_settings.feature_penalty * penalty
            parts["feature_penalty"] = penalty.detach()
        if detail:
            parts.update(self._detail(predictions, hidden, mask))
        return loss, parts

    @torch.no_grad()
    def _detail(self, predictions, hidden, mask) -> dict[str, Tensor]:
        """How far the student is from each teacher's own layers, whatever it was trained on."""
        parts = {}
        for name, prediction in self.aggregate.per_teacher(predictions).items():
            terms = distillation_terms(prediction, hidden[name], mask)
            size = hidden[name].abs().mean((0, 2, 3))
            for i, layer in enumerate(self.teachers[name].layers):
                parts[f"{name}/l1_layer{layer}"] = terms.l1[i]
                parts[f"{name}/cosine_layer{layer}"] = terms.cosine[i]
                parts[f"{name}/target_abs_layer{layer}"] = size[i]
        return parts
