"""The whole method in one module: teachers, aggregation, student, heads, loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import build_aggregation, one_width
from .heads import PredictionHeads
from .losses import distillation_loss, distillation_terms, frame_terms
from .settings import DistillSettings
from .student import Student
from .target_norm import Standardiser
from .teachers import TeacherEnsemble
from .unit_loss import UnitLabels, check_units, unit_terms
from .weighting import agreeing_dims, drop_teachers, weights_at


class EnsembleDistiller(nn.Module):
    """Ensemble knowledge distillation (Huang et al. 2023, arXiv 2302.12757).

    Args:
        teachers: the frozen teachers, by their names in the settings.
        student: the student's backbone.
        settings: the experiment.
        units: hard labels for a classification head, or None; see :class:`UnitLabels`.

    Raises:
        TeacherError: the teachers cannot be aggregated this way, have another frame rate, or not
            the layer that the units are of.
    """

    def __init__(
        self,
        teachers: TeacherEnsemble,
        student: Student,
        settings: DistillSettings,
        units: UnitLabels | None = None,
    ):
        super().__init__()
        for name, teacher in teachers.items():
            if teacher.stride != student.settings.stride:
                raise TeacherError(
                    f"teachers.{name} gives a frame every {teacher.stride} samples and the student "
                    f"every {student.settings.stride}; use one frame rate"
                )
        targets, shapes = settings.targets, teachers.shapes
        if settings.essence.keep < 1:
            one_width(shapes, "essence.keep")
        self.settings = settings
        self.teachers = teachers
        self.aggregate = build_aggregation(settings.aggregation, shapes, targets)
        self.standardiser = None
        if targets.standardise != "none":
            self.standardiser = Standardiser(shapes, targets.standardise, targets.standardise_steps)
        heads = PredictionHeads(student.width, self.aggregate.specs, settings.heads.kind)
        # What is trained, apart from what is not: an optimizer over `trainable` sees no teacher.
        self.trainable = nn.ModuleDict({"student": student, "heads": heads})
        self.units = units
        if units is not None:
            check_units(units, teachers)
            self.trainable["unit_head"] = nn.Linear(student.width, units.clusters)

    @property
    def student(self) -> Student:
        return self.trainable["student"]

    @property
    def heads(self) -> PredictionHeads:
        return self.trainable["heads"]

    def forward(
        self,
        waves: Tensor,
        lengths: Tensor,
        teacher_waves: Tensor | None = None,
        step: int = 1,
        detail: bool = False,
        known: Mapping[str, Tensor] | None = None,
        known_frames: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of distillation.

        Args:
            waves: what the student hears, ``[batch, sample]`` at 16 kHz, zero-padded at the end.
            lengths: ``[batch]`` valid samples.
            teacher_waves: what the teachers hear, of the same shape; None: the same.
            step: the number of the step, from 1, for weights that change over time.
            detail: also give the terms of every teacher and layer.
            known: what the teachers have said of these utterances before, in their place: their
                targets ``{teacher: [batch, target, frame, dim]}``, or ``{target set: [batch,
                layer, frame, width]}`` where these were aggregated already. The terms of teachers
                are not known then.
            known_frames: ``[batch]`` how many of their frames are of the utterance.

        Returns:
            The scalar loss, and scalars by name for the log.
        """
        if known is None:
            heard = waves if teacher_waves is None else teacher_waves
            unpadded = [wave[:length] for wave, length in zip(heard, lengths.tolist(), strict=True)]
            also = None if self.units is None else {self.units.teacher: self.units.layer}
            states = self.teachers.states(unpadded, also)
            hidden = self.teachers.targets(states)  # {teacher: [batch, layer, frame, dim]}
        else:
            states, hidden = None, known
        out = self.student(waves, lengths)
        predictions = self.heads(out.last)  # {target set: [batch, layer, frame, width]}

        frames = min(out.last.shape[1], *(states.shape[2] for states in hidden.values()))
        hidden = {name: states[:, :, :frames] for name, states in hidden.items()}
        # In float32 under autocast too: the loss is a sum over many small differences.
        predictions = {name: states[:, :, :frames].float() for name, states in predictions.items()}
        valid = out.mask[:, :frames]
        if known_frames is not None:
            valid = valid * (torch.arange(frames, device=valid.device) < known_frames[:, None])
        labels = None if self.units is None else self._labels(states, hidden)
        aggregated = known is not None and known.keys() != self.teachers.keys()
        if self.standardiser is not None:
            hidden = self.standardiser(hidden, valid, learn=self.training)

        weights = weights_at(self.settings.teachers, step, self.settings.targets.weight_steps)
        targets = hidden if aggregated else self.aggregate.targets(hidden, weights)
        loss, parts = distillation_loss(
            predictions,
            targets,
            self._masks(predictions, targets, valid),
            self.settings.loss,
            self.aggregate.set_weights(weights),
            self._dims(hidden, weights, targets),
            self._count(valid),
        )
        if self.units is not None:
            logits = self.trainable["unit_head"](out.last)
            unit_loss, parts["unit_accuracy"] = unit_terms(
                logits, labels, out.mask if known is None else valid
            )
            parts["unit_loss"] = unit_loss.detach()
            loss = loss + self.settings.essence.unit_weight * unit_loss
        if self.settings.loss.feature_penalty:
            penalty = out.features.float().pow(2).mean()
            loss = loss + self.settings.loss.feature_penalty * penalty
            parts["feature_penalty"] = penalty.detach()
        if detail and self.standardiser is not None:
            parts.update(self.standardiser.left_out())
        if detail and not aggregated:
            mask = valid if self.settings.loss.mask_padding else None
            parts.update(self._detail(predictions, hidden, mask))
        return loss, parts

    def learn_nothing(self) -> None:
        """Take part in what several processes learn together, without an utterance."""
        if self.standardiser is not None and self.training:
            self.standardiser.learn_nothing()

    def _labels(self, states: Mapping | None, hidden: Mapping[str, Tensor]) -> Tensor:
        """The units ``[batch, frame]``; without the teacher's states, by its layer's target."""
        name, layer = self.units.teacher, self.units.layer
        if states is not None:
            return self.units.label(states[name][layer])
        return self.units.label(hidden[name][:, self.teachers[name].targets.index((layer,))])

    def _masks(
        self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], valid: Tensor
    ) -> dict[str, Tensor | None]:
        """How much each frame counts, for each target set: padding and dropped teachers."""
        mask = valid if self.settings.loss.mask_padding else None
        masks: dict[str, Tensor | None] = dict.fromkeys(targets, mask)
        probability = self.settings.targets.drop_teachers
        if probability and self.training:
            losses = {}
            for name in self.teachers:
                rec, cosine = frame_terms(
                    predictions[name].detach(), targets[name], self.settings.loss
                )
                each = (rec + self.settings.loss.cosine_weight * cosine).mean(1)  # [batch, frame]
                losses[name] = (each * valid).sum(1) / valid.sum(1).clamp(min=1)
            every = torch.ones_like(valid) if mask is None else mask
            for name, stays in drop_teachers(losses, probability).items():
                masks[name] = every * stays[:, None]
        return masks

    def _count(self, valid: Tensor) -> Tensor | None:
        """The frames to divide by under teacher dropping: the valid ones, not those that are left.

        A dropped utterance then counts as no loss. Divided by what is left, an utterance would
        weigh more the more of its neighbours in the batch were dropped.
        """
        if not (self.settings.targets.drop_teachers and self.training):
            return None
        return (valid if self.settings.loss.mask_padding else torch.ones_like(valid)).sum()

    def _dims(
        self,
        hidden: Mapping[str, Tensor],
        weights: Mapping[str, float],
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """How much each dimension counts, for the target sets where it is not all the same."""
        dims = self.aggregate.dim_weights(weights)
        if self.settings.essence.keep == 1:
            return dims
        kept = agreeing_dims(hidden, self.settings.essence.keep)
        for name, target in targets.items():
            times = target.shape[-1] // kept.shape[-1]  # concat: once for each teacher
            share = kept.repeat(1, 1, 1, times)
            dims[name] = share * dims[name].to(share) if name in dims else share
        return dims

    @torch.no_grad()
    def _detail(
        self, predictions: Mapping[str, Tensor], hidden: Mapping[str, Tensor], mask: Tensor | None
    ) -> dict[str, Tensor]:
        """How far the student is from each teacher's own layers, whatever it was trained on."""
        parts = {}
        for name, prediction in self.aggregate.per_teacher(predictions).items():
            terms = distillation_terms(prediction, hidden[name], mask, self.settings.loss)
            size = hidden[name].abs().mean((0, 2, 3))
            for i, label in enumerate(self.teachers[name].labels):
                kind = self.settings.loss.reconstruction
                parts[f"{name}/{kind}_{label}"] = terms.reconstruction[i]
                parts[f"{name}/cosine_{label}"] = terms.cosine[i]
                parts[f"{name}/target_abs_{label}"] = size[i]
        return parts
